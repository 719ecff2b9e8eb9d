# Everything runs in a virtual environment of its own. The first call of any target installs it.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

GPU_PARTS = gpu-parity gpu-launches gpu-bench gpu-memory gpu-tune

.PHONY: quick test test-all test-interpreter test-others all-interpreter all-interpreter-linear \
	all-others all-avx2 test-control test-torch demo study control bench bench-linear gpu $(GPU_PARTS) \
	sanitize lint docs hub clean

# Each part is one process without threads that wait for another's, two at a time. Its output goes to
# build/, with a line of progress now and then, and is shown when it is done. MAKEFLAGS would tell a
# build within a test of job slots that it cannot have.
PART = MAKEFLAGS= OMP_NUM_THREADS=1 R2VPO_TEST_PROGRESS=$@:3 $(RUN) -m pytest -q
TOLD = 3>&2 >build/$@.log 2>&1; code=$$?; cat build/$@.log; exit $$code
PARTS = mkdir -p build; $(MAKE) --no-print-directory --jobs 2

# The reference, errors, the dual, and one case of parity per backend: in a minute.
quick: $(VENV)/ready
	OMP_NUM_THREADS=1 R2VPO_TEST_EXAMPLES=1 $(RUN) -m pytest -q -m "not slow" tests/reference \
		tests/kernels/test_parity.py

# All but what is marked slow, with fewer drawn examples.
test: $(VENV)/ready
	@$(PARTS) test-interpreter test-others

# What .ci/run runs: everything, the longest first.
test-all: $(VENV)/ready
	@$(PARTS) all-interpreter all-others all-interpreter-linear all-avx2

test-interpreter:
	@R2VPO_TEST_EXAMPLES=2 $(PART) -m "interpreter and not slow" $(TOLD)

test-others:
	@R2VPO_TEST_EXAMPLES=5 $(PART) -m "not interpreter and not slow" $(TOLD)

# An interpreter takes a hundred times as long for an example as a kernel.
all-interpreter:
	@R2VPO_TEST_EXAMPLES=6 $(PART) -m interpreter --ignore tests/linear $(TOLD)

all-interpreter-linear:
	@R2VPO_TEST_EXAMPLES=5 $(PART) -m interpreter tests/linear $(TOLD)

all-others:
	@R2VPO_TEST_EXAMPLES=20 $(PART) -m "not interpreter" $(TOLD)

# Parity once more, as on a processor with neither AVX-512 nor matrix units. Inductor's cache takes
# what was compiled for one instruction set for any other.
all-avx2:
	@ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/avx2 \
		$(PART) tests/kernels/test_parity.py tests/kernels/test_laws.py \
		tests/kernels/test_known_bugs.py tests/linear -m "not interpreter" -k "not cuda" $(TOLD)

# Of examples/continuous_control.py, whose environments have wheels for Linux alone.
test-control: $(VENV)/control
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/tools/test_control.py

# The package alone with another torch, in an environment of its own, without trainers and tools. The
# installed package is tested: `python -m pytest` would take the one in this folder.
TORCH ?= 2.11.0
OTHER = build/torch-$(TORCH)
test-torch:
	rm -rf build/lib*
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet torch==$(TORCH) numpy pytest hypothesis \
		pybind11 ninja "setuptools>=77,<82"
	$(OTHER)/bin/python -m pip install --quiet .
	R2VPO_TEST_EXAMPLES=5 OMP_NUM_THREADS=1 $(OTHER)/bin/pytest -q -m "not slow" \
		tests/reference tests/kernels

demo: $(VENV)/ready
	$(RUN) examples/train_tiny.py

# The short form; docs/study.md has the command and the cost of the full one.
study: $(VENV)/ready
	$(RUN) examples/study_staleness.py
	$(RUN) examples/study_report.py

# The short form; examples/continuous_control.py says what the full one costs.
control: $(VENV)/control
	$(RUN) examples/continuous_control.py
	$(RUN) examples/control_report.py

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

# For the Hugging Face Hub: what runs without a compiler, without what imports the package by name.
HUB = build/hub
hub:
	rm -rf $(HUB)
	mkdir -p $(HUB)/torch-ext
	cp hub/* $(HUB)
	cp -r r2vpo_kernels $(HUB)/torch-ext
	cd $(HUB)/torch-ext/r2vpo_kernels && rm -rf integrations backends/*.so backends/build_report.json
	find $(HUB) -name __pycache__ -prune -exec rm -r {} +

$(VENV)/docs: $(VENV)/ready requirements-docs.txt
	$(RUN) -m pip install --quiet --no-compile --requirement requirements-docs.txt
	touch $@

$(VENV)/control: $(VENV)/ready requirements-control.txt
	$(RUN) -m pip install --quiet --no-compile --requirement requirements-control.txt
	touch $@

# Most of what is installed is never imported: not compiling it halves the time.
$(VENV)/ready: requirements-dev.txt requirements-no-deps.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --requirement requirements-dev.txt
	$(RUN) -m pip install --quiet --no-compile --no-deps --requirement requirements-no-deps.txt
	$(RUN) -m pip install --quiet --editable .
	touch $@

clean:
	rm -rf $(VENV) demo study control build benchmarks/out
