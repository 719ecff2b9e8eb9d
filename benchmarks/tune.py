"""Time what the static table in backends/triton/launch.py chooses between, on a GPU.

    python benchmarks/tune.py [--n 8192] [--v 32000 128256 151936 262144]

For each vocabulary: every way to walk a row that compiles, each held to the float64 truth before it
is timed, beside a copy, Triton's table as it stands, and the CUDA kernels. Writes tune.csv into
--out. Without a GPU there is nothing to time, and it says so.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from loss import COLUMNS, FULL, cell  # first: it finds the package, installed or not

import torch  # isort: skip
from contenders import contenders
from measure import Row, add_options, begin, write_csv

from r2vpo_kernels.backends.triton import launch

ENTRANTS = ("triton one-pass", "triton log-probs")
CANDIDATES = [
    launch.Tuning(threads, per_thread, programs)
    for threads, per_thread, programs in itertools.product((256, 512, 1024), (8, 16, 32), (1, 2, 4))
    # Threads of a multiprocessor.
    if threads * programs <= 2048
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--v", type=int, nargs="+", default=FULL["v"], help="vocabularies")
    everyone = {c.name: c for c in contenders()}
    add_options(parser, ENTRANTS, rounds=5)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type != "cuda":
        print("No GPU here: nothing to time.")
        return 0
    machine = begin(options)
    as_it_stands = launch.TUNING
    rows: list[Row] = []
    for v in options.v:
        tables = {"as it stands": as_it_stands}
        tables |= {str(tuple(x)): ((2**63, x),) for x in CANDIDATES}
        for name, table in tables.items():
            launch.TUNING = table
            entrants = [everyone[x] for x in options.contenders or ENTRANTS]
            if table is as_it_stands:
                entrants.append(everyone["cuda one-pass"])
            for row in cell(options.n, v, torch.bfloat16, device, entrants, options.rounds):
                rows.append(row | {"tuning": name})
                if row["status"] != "timed":
                    print(f"{v:7} {name:16} {row['contender']:18} {row['status']}")
                    continue
                share = f"{row['share_of_copy']:.2f} of a copy"
                print(f"{v:7} {name:16} {row['contender']:18} {row['both_ms']:8.3f} ms  {share}")
            write_csv(options.out / "tune.csv", ["tuning", *COLUMNS], rows, machine)
    launch.TUNING = as_it_stands
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
