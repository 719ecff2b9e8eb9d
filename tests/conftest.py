"""One device per run: the CPU, where Triton kernels run in its interpreter, or a GPU.

R2VPO_TEST_DEVICE=cuda runs the same tests on a GPU, with compiled kernels.
"""

import os
import sys
import time

DEVICE_NAME = os.environ.get("R2VPO_TEST_DEVICE", "cpu")
if DEVICE_NAME == "cpu":
    # Before Triton is imported: the interpreter and the compiler do not mix in one process.
    os.environ["TRITON_INTERPRET"] = "1"

    # The test of the CUDA kernels' source on a machine without a GPU.
    from support.emulator.build import emulate_cuda

    emulate_cuda()

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from support.small_steps import walk_in_small_steps  # noqa: E402

from r2vpo_kernels.backends import registry  # noqa: E402
from r2vpo_kernels.sources import products  # noqa: E402

# Fixtures of tests/integrations. A second conftest.py would be another module of this one's name.
pytest_plugins = ["support.trainer_modules"]

# The trainers are installed for one Python (requirements-dev.txt).
TRAINERS = ["integrations", "linear/test_adapter.py"]
collect_ignore = [] if sys.version_info[:2] == (3, 11) else TRAINERS

# An interpreter takes a hundred times as long for one: the Makefile asks for fewer there.
EXAMPLES = int(os.environ.get("R2VPO_TEST_EXAMPLES", "30"))
settings.register_profile(
    "default",
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def _several_blocks_per_row():
    """Small blocks, so that small vocabularies are read in several."""
    if DEVICE_NAME == "cpu":
        walk_in_small_steps()


@pytest.fixture(scope="session", autouse=True)
def _poison():
    """torch.empty comes filled with NaN, and an op that is not deterministic raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(3).isnan().all()


@pytest.fixture(scope="session", autouse=True)
def _sums_are_float32():
    """As the budget of a product has them; of halves, torch lets a GPU round parts of a sum."""
    for kind in ("bf16", "fp16"):
        setattr(torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction", False)


KERNELS = [name for name in registry.available() if name != "cpp" or DEVICE_NAME == "cpu"]


@pytest.fixture(scope="session", params=["eager", *KERNELS])
def backend(request):
    return request.param


@pytest.fixture(scope="session", params=KERNELS)
def kernels(request):
    """A backend that is not eager torch."""
    return request.param


@pytest.fixture(scope="session")
def device():
    return torch.device(DEVICE_NAME)


@pytest.fixture(
    scope="module",
    # A GPU has units for them, whatever the environment says.
    params=["native", pytest.param("float32", marks=pytest.mark.slow_in_interpreter)][
        : 2 if DEVICE_NAME == "cpu" else 1
    ],
)
def halves(request):
    """How a CPU multiplies them, whatever its units; in blocks of which a product needs several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2VPO_KERNELS_HALF_PRODUCTS", request.param)
        patch.setattr(products, "SIDE", 8)
        patch.setattr(products, "ALIGNED", 4)
        patch.setattr(products, "TILE", {"elsewhere": 100})
        yield request.param


def pytest_collection_modifyitems(items):
    """What runs in Triton's interpreter is marked so, and slow where its test is slow there."""
    for item in items:
        if DEVICE_NAME == "cpu" and "triton" in item.name:
            item.add_marker("interpreter")
            if item.get_closest_marker("slow_in_interpreter"):
                item.add_marker("slow")


class Progress:
    """A line every few seconds on a file descriptor of its own, where pytest's output is a file."""

    def __init__(self, name, descriptor, total):
        self.name, self.descriptor, self.total = name, descriptor, total
        self.done, self.failed, self.told = 0, 0, time.monotonic()

    def pytest_runtest_logreport(self, report):
        self.failed += report.failed
        self.done += report.when == "teardown"
        if time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            line = f"{self.name}: {self.done} of {self.total} tests, {self.failed} failed\n"
            os.write(self.descriptor, line.encode())


def pytest_collection_finish(session):
    if "R2VPO_TEST_PROGRESS" in os.environ:
        name, descriptor = os.environ["R2VPO_TEST_PROGRESS"].split(":")
        session.config.pluginmanager.register(Progress(name, int(descriptor), len(session.items)))
    _gate_comes_last(session)


def _gate_comes_last(session):
    """The ahead-of-time gate compiles in the background, and comes last."""
    gate = [item for item in session.items if item.path.name == "test_aot.py"]
    if gate and not session.config.option.collectonly:
        from support.aot import start_compiling

        start_compiling(dict.fromkeys(item.callspec.params["report"] for item in gate))
        session.items[:] = [item for item in session.items if item not in gate] + gate


def pytest_terminal_summary(terminalreporter):
    from support.aot import REPORTS, name
    from support.harness import USED

    for target, kernels in REPORTS.items():
        terminalreporter.section(f"{target}: registers and spills")
        for k in kernels:
            line = f"{name(k):45} {k['registers']:4} {k['spills']:4}"
            terminalreporter.write_line(line)
    if USED:
        terminalreporter.section("worst error / budget")
        for (backend, dtype, name), share in sorted(USED.items()):
            terminalreporter.write_line(f"{backend:8} {dtype:10} {name:16} {share:.3f}")
