"""What the benchmarks take from the tests: truth, the error budget, the count of launches."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.harness import check_gradient, truth_of
from support.launches import count_launches
from support.tolerance import Truth, U, output_rounding, worst

__all__ = [
    "Truth", "U", "check_gradient", "count_launches", "output_rounding", "truth_of", "worst",
]  # fmt: skip
