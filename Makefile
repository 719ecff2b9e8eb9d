# Everything runs in a virtual environment of its own. The first call of any target installs it.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

GPU_PARTS = gpu-parity gpu-launches gpu-bench gpu-memory gpu-tune

.PHONY: test test-triton test-triton-others test-others test-avx2 demo study bench bench-linear gpu $(GPU_PARTS) sanitize \
	lint docs clean

# On two cores, without threads that wait for each other's: what Triton's interpreter runs, which is
# slow, and everything else. MAKEFLAGS would tell a build within a test of job slots that it cannot have.
HALF = MAKEFLAGS= OMP_NUM_THREADS=1 $(RUN) -m pytest
test: $(VENV)/ready
	@echo "three parts and one once more, two at a time, each shown when it is done: twenty minutes"
	$(MAKE) --no-print-directory --jobs 2 --output-sync \
		test-others test-triton test-triton-others test-avx2

test-triton: $(VENV)/ready
	R2VPO_TEST_EXAMPLES=10 $(HALF) tests/kernels -k triton

test-triton-others: $(VENV)/ready
	R2VPO_TEST_EXAMPLES=10 $(HALF) --ignore tests/kernels -k triton

test-others: $(VENV)/ready
	$(HALF) -k "not triton"

# Parity once more, as on a processor with neither AVX-512 nor matrix units. Inductor's cache takes
# what was compiled for one instruction set for any other.
test-avx2: $(VENV)/ready
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/avx2 \
		$(HALF) tests/kernels/test_parity.py tests/kernels/test_laws.py \
		tests/kernels/test_known_bugs.py tests/linear -k "not triton and not cuda"

demo: $(VENV)/ready
	$(RUN) examples/train_tiny.py

# The short form; docs/study.md has the command and the cost of the full one.
study: $(VENV)/ready
	$(RUN) examples/study_staleness.py
	$(RUN) examples/study_report.py

bench: $(VENV)/ready
	$(RUN) benchmarks/loss.py
	$(RUN) benchmarks/overhead.py

# Beside the peers that are installed (benchmarks/requirements.txt).
bench-linear: $(VENV)/ready
	$(RUN) benchmarks/linear.py
	$(RUN) benchmarks/sparse_head.py

# All parts in order, or one alone. Each ends within eight minutes and writes as it goes, into
# benchmarks/out/gpu or as GPU_FLAGS="--out FOLDER" says. With the torch that is there, if any: that
# of a machine with a GPU fits it, and needs no network.
gpu $(GPU_PARTS): PART = $(patsubst gpu-%,%,$(filter gpu-%,$@))
gpu $(GPU_PARTS):
	if $(PYTHON) -c "import torch"; then $(PYTHON) benchmarks/gpu.py $(PART) $(GPU_FLAGS); \
	else $(MAKE) $(VENV)/ready && $(RUN) benchmarks/gpu.py $(PART) $(GPU_FLAGS); fi

# The C++ kernels and their tests under AddressSanitizer and UBSan.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(VENV)/ready
	CXXFLAGS="$(SANITIZE) -O1 -g" LDFLAGS="$(SANITIZE)" $(RUN) setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitize/lib $(VENV)/bin/pytest -k "cpp and not compile"

lint: $(VENV)/ready
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --config pyproject.toml

# The site, into build/site; a link that leads nowhere is an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

$(VENV)/docs: $(VENV)/ready requirements-docs.txt
	$(RUN) -m pip install --quiet --no-compile --requirement requirements-docs.txt
	touch $@

# Most of what is installed is never imported: not compiling it halves the time.
$(VENV)/ready: requirements-dev.txt requirements-no-deps.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --requirement requirements-dev.txt
	$(RUN) -m pip install --quiet --no-compile --no-deps --requirement requirements-no-deps.txt
	$(RUN) -m pip install --quiet --editable .
	touch $@

clean:
	rm -rf $(VENV) demo study build benchmarks/out
