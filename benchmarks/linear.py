"""Time the loss from hidden states and the LM head, and both gradients, contenders side by side.

    python benchmarks/linear.py                  # 1024 tokens, vocabulary 151936, width 1024
    python benchmarks/linear.py --full           # more tokens; on a GPU a wider head too
    python benchmarks/linear.py --n 512 --v 32000 --contenders "cpp linear" eager

Each contender must agree with the float64 truth at the shape in question before it is timed. A
round times each of them once, so that all see the same states of the machine. Beside them stand the
three matrix products without which there is no gradient. Writes linear.csv and linear.png into
--out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# From the checkout, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import contenders as from_logits  # noqa: E402
from contenders import SCRATCH, Task, plain_logps, plain_loss, plain_objective  # noqa: E402
from from_tests import U, output_rounding  # noqa: E402
from loss import sequences_of  # noqa: E402
from measure import (  # noqa: E402
    TIMES,
    Row,
    Spread,
    Stopwatch,
    add_options,
    begin,
    draw_bars,
    free_memory,
    peak_memory,
    report,
    timed,
    times_text,
    version_of,
)
from parity import MULTIPLE, SAMPLED_ROWS, Parity, make_task  # noqa: E402

from r2vpo_kernels import linear_r2vpo_loss, linear_token_logps  # noqa: E402
from r2vpo_kernels.backends import registry  # noqa: E402
from r2vpo_kernels.sources.products import multiplies_in_float32  # noqa: E402

SHORT = {"n": [1024], "v": [151936], "h": [1024]}
FULL = {"cpu": SHORT | {"n": [1024, 4096]}, "cuda": SHORT | {"n": [16384], "h": [4096]}}
# The standard deviation of logits, and λ.
SPREAD, VARIANCE_COEF = 3.0, 2.5
# Rows of the head's gradient that are looked at: half of words that are labels, half of others.
SAMPLED_WORDS = 64
# What ours may take of plain torch's RMS errors; others may take MULTIPLE. In bfloat16 both round
# the same logits and the same gradient of them; in float32 two draws of few roundings are compared.
OURS = {torch.bfloat16: 1.25, torch.float32: 2.5}
# Logits that the truth holds at a time, at some thirty bytes each.
CHUNK = {"cpu": 2**25, "cuda": 2**27}
# The tokens at a time of torch's own chunked cross-entropy on a CPU, where it would choose eight
# and add a float32 gradient of the head for each eight: minutes a step.
CROSS_ENTROPY_TOKENS = 1024

COLUMNS = [
    "n", "v", "h", "dtype", "contender", "status", "limit_used", "rms_over_eager",
    "forward_ms", "forward_iqr_ms", "backward_ms", "backward_iqr_ms", "both_ms", "both_iqr_ms",
    "host_ms", "peak_bytes", "scratch_bytes", "over_products", "over_ours", "samples",
]  # fmt: skip

# From log-probs (B, T).
Objective = Callable[[Tensor, Task], Tensor]
# From hidden states (B, T, H) and the head (V, H) to a loss, or to log-probs without a gradient.
Function = Callable[[Tensor, Tensor, Any], Tensor]


def all_logits(row: Row) -> float:
    """Bytes of a contender that holds them all at once, and as much besides as eager torch."""
    return SCRATCH * row["n"] * row["v"]


# What is optimised. The one with a center of one is plain_objective.


def group_objective(logps: Tensor, task: Task) -> Tensor:
    """All tokens are one group."""
    ratio = (logps - task.old_logps).exp()
    penalty = task.variance_coef * (ratio - ratio.mean()) ** 2
    return (-task.advantages[:, None] * ratio + penalty).mean()


def unpenalised(logps: Tensor, task: Task) -> Tensor:
    return plain_objective(logps, dataclasses.replace(task, variance_coef=0.0))


def cross_entropy(logps: Tensor, task: Task) -> Tensor:
    return -logps.mean()


# Who computes it.


@dataclass(frozen=True)
class Contender:
    """One way to the loss and its gradients, or to the log-probs.

    name: what tables call it.
    make: returns the function; an ImportError says what is not installed.
    objective: what it is held to; None: the log-probs, without a gradient.
    why_not: why it cannot take these hidden states, or None.
    ours: held to OURS times plain torch's errors; others to MULTIPLE.
    needs: bytes that must be free, by what its row says of the shape.
    """

    name: str
    make: Callable[[], Function]
    objective: Objective | None = plain_objective
    why_not: Callable[[Tensor], str | None] = lambda hidden: None
    ours: bool = False
    needs: Callable[[Row], float] = lambda row: 0.0


def three_products(hidden: Tensor, weight: Tensor, task: Task) -> Any:
    """Logits and, as if these were their own gradient, the gradients of hidden states and head.

    Where the linear route multiplies halves in float32, they are of float32 matrices.
    """
    hidden = hidden.flatten(0, 1)
    z = hidden @ weight.t()
    return z, z @ weight, z.t() @ hidden


PRODUCTS = Contender("three products", lambda: three_products, None)


def ours(backend: str) -> list[Contender]:
    def loss(hidden: Tensor, weight: Tensor, task: Task, **options: Any) -> Tensor:
        return linear_r2vpo_loss(
            hidden, weight, task.labels, task.old_logps, task.advantages, backend=backend,
            variance_coef=task.variance_coef, **options,
        ).loss  # fmt: skip

    def log_probs(hidden: Tensor, weight: Tensor, task: Task, **options: Any) -> Tensor:
        return linear_token_logps(hidden, weight, task.labels, backend=backend, **options)

    # Of hidden states it asks the same as of logits.
    why_not = from_logits.ours(backend)[-1].why_not

    def why_not_wider(hidden: Tensor) -> str | None:
        wide = hidden.dtype == torch.float32
        return "its logits are float32 as they are" if wide else why_not(hidden)

    def contender(
        name: str, function: Function, objective: Objective | None, why_not: Any = why_not
    ) -> Contender:
        return Contender(f"{backend} {name}", lambda: function, objective, why_not, ours=True)

    def float32(name: str, function: Function, objective: Objective | None) -> Contender:
        function = functools.partial(function, logits_dtype=torch.float32)
        return contender(f"{name}, float32 logits", function, objective, why_not_wider)

    return [
        contender("linear", loss, plain_objective),
        contender("linear, group", functools.partial(loss, center="group"), group_objective),
        contender("linear log-probs", log_probs, None),
        float32("linear", loss, plain_objective),
        float32("linear log-probs", log_probs, None),
    ]


def eager(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
    return plain_loss(F.linear(hidden, weight), task)


def compiled() -> Function:
    @functools.partial(torch.compile, dynamic=False)
    def of_tensors(
        hidden: Tensor, weight: Tensor, labels: Tensor, old_logps: Tensor, advantages: Tensor,
        variance_coef: float,
    ) -> Tensor:  # fmt: skip
        return eager(hidden, weight, Task(labels, old_logps, advantages, variance_coef))

    def loss(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
        return of_tensors(
            hidden, weight, task.labels, task.old_logps, task.advantages, task.variance_coef
        )

    return loss


def trl() -> Function:
    """TRL's log-probs by chunks of the vocabulary as its trainers take them, the plain objective on
    top. It needs all that TRL's trainers import.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def loss(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
        logps, *_ = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, task.labels.flatten(), 1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, (),
        )  # fmt: skip
        return plain_objective(logps.view_as(task.labels), task)

    return loss


def liger(compiled: bool) -> Function:
    """Liger's GRPO loss, a sequence at a time: PPO's clip with bounds that no ratio reaches."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, epsilon_low=1.0, epsilon_high=1e9,
        loss_type="dapo",
    )  # fmt: skip

    def loss(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
        value, _ = module(
            hidden, weight, task.labels, torch.ones_like(task.labels), task.advantages,
            old_per_token_logps=task.old_logps,
        )  # fmt: skip
        return value

    return loss


def torch_cross_entropy() -> Function:
    def loss(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
        tokens = None if hidden.is_cuda else CROSS_ENTROPY_TOKENS
        return F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, task.labels.flatten(),
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=tokens),
        )  # fmt: skip

    return loss


def needs_chunked_cross_entropy(hidden: Tensor) -> str | None:
    there = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if there else f"torch {torch.__version__} has none in chunks"


def cce() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, task: Task) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), weight, task.labels.flatten())

    return loss


def needs_gpu(hidden: Tensor) -> str | None:
    return None if hidden.is_cuda else f"it runs on a GPU, and hidden states are on {hidden.device}"


def contenders() -> list[Contender]:
    """All of them, whether or not they can run here."""
    return [
        *(contender for backend in registry.TABLE for contender in ours(backend)),
        Contender("eager", lambda: eager, needs=all_logits),
        Contender("torch.compile", compiled, needs=all_logits),
        Contender("TRL chunked", trl),
        Contender("Liger chunked GRPO", lambda: liger(True), unpenalised),
        Contender("Liger, not compiled", lambda: liger(False), unpenalised),
        Contender(
            "linear_cross_entropy", torch_cross_entropy, cross_entropy, needs_chunked_cross_entropy
        ),
        Contender("CCE", cce, cross_entropy, needs_gpu),
    ]


# Right first.


@torch.no_grad()
def make_batch(hidden: Tensor, weight: Tensor) -> Task:
    """As parity.make_task, a sequence at a time: the logits are not all there at once."""
    parts = [
        make_task(F.linear(sequence, weight), VARIANCE_COEF, False, seed)
        for seed, sequence in enumerate(hidden.split(1))
    ]
    labels, old_logps, advantages = (
        torch.cat(tensors)
        for tensors in zip(*((x.labels, x.old_logps, x.advantages) for x in parts), strict=True)
    )
    return Task(labels, old_logps, advantages, VARIANCE_COEF)


@dataclass(frozen=True)
class Exact:
    """The truth of an objective, or of the log-probs, and how far off plain torch is."""

    value: Tensor
    error: float
    floor: float
    # Of samples of the gradients, by name.
    gradients: dict[str, Tensor]
    gradient_errors: dict[str, float]


class Truth:
    """Log-probs in float64 from the rounded inputs, and what samples of the gradients follow from.

    Of the gradients it has some rows: all of them would need the logits in float64. Rows of the
    head whose words are labels are apart from others, whose gradients are so much smaller that
    errors in them would not show beside.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, task: Task) -> None:
        self.hidden, self.weight = hidden.detach().flatten(0, 1), weight.detach()
        self.task, self.labels = task, task.labels.flatten()
        count, vocabulary = len(self.labels), len(weight)
        chunk = CHUNK[hidden.device.type]
        self.rows = max(1, chunk // vocabulary)

        def some(of: int, number: int) -> Tensor:
            return torch.linspace(0, of - 1, min(of, number), device=hidden.device).long()

        self.tokens = some(count, SAMPLED_ROWS)
        of_labels = self.labels[some(count, SAMPLED_WORDS // 2)].unique()
        others = some(vocabulary, SAMPLED_WORDS // 2)
        others = others[~torch.isin(others, self.labels)]
        self.words = {"dweight of labels": of_labels}
        if len(others):
            self.words["dweight of other words"] = others

        blocks = self.weight.split(max(1, chunk // count))
        exact = self.hidden.double()
        totals, of_tokens = [], []
        for block in blocks:
            z = exact @ block.double().t()
            totals.append(z.logsumexp(-1))
            of_tokens.append(z[self.tokens])
        total = torch.stack(totals).logsumexp(0)
        heads = self.weight[self.labels]
        self.logps = (exact * heads.double()).sum(-1) - total
        self.plain_logps = torch.cat(
            [
                plain_logps(F.linear(rows, self.weight), labels)
                for rows, labels in zip(
                    self.hidden.split(self.rows), self.labels.split(self.rows), strict=True
                )
            ]
        )

        # d logp / d hidden of the sampled tokens: the label's row of the head less the mean row.
        mean = torch.zeros_like(exact[self.tokens])
        for block, z in zip(blocks, of_tokens, strict=True):
            mean += (z - total[self.tokens, None]).exp() @ block.double()
        self.dhidden = heads[self.tokens].double() - mean
        # d logp / d logit of all tokens, of the sampled words.
        self.dlogits = {}
        for name, words in self.words.items():
            p = (exact @ self.weight[words].double().t() - total[:, None]).exp()
            self.dlogits[name] = (self.labels[:, None] == words).double() - p
        self.known: dict[Objective | None, Exact] = {}

    def of(self, objective: Objective | None) -> Exact:
        if objective not in self.known:
            self.known[objective] = self._find(objective)
        return self.known[objective]

    def _find(self, objective: Objective | None) -> Exact:
        if objective is None:
            return Exact(self.logps, _rms(self.plain_logps - self.logps), 0.0, {}, {})
        loss, slope = self._differentiate(objective, self.logps)
        plain, plain_slope = self._differentiate(objective, self.plain_logps)
        exact = {"dhidden": slope[self.tokens, None] * self.dhidden}
        for name, of_words in self.dlogits.items():
            exact[name] = (slope[:, None] * of_words).t() @ self.hidden.double()
        found = self._plain_gradients(plain_slope)
        # One number, of plain torch too, may be right by luck. What its log-probs are off by, had
        # each error a sign of its own, is not: that comes from the rounding of the logits.
        expected = (slope * (self.plain_logps - self.logps)).square().sum().sqrt()
        return Exact(
            loss,
            torch.maximum((plain - loss).abs(), expected).item(),
            # A handful of float32 operations on each ratio, as a share of it.
            8 * U * slope.abs().sum().item(),
            exact,
            {name: _rms(found[name] - exact[name]) for name in exact},
        )

    def _differentiate(self, objective: Objective, logps: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logps.view_as(self.task.labels).detach().requires_grad_()
        loss = objective(leaf, self.task)
        (slope,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), slope.flatten()

    def _plain_gradients(self, slope: Tensor) -> dict[str, Tensor]:
        """The samples as plain torch has them, without holding all logits."""
        of_tokens, of_words = [], []
        words = torch.cat(list(self.words.values()))
        chunks = (x.split(self.rows) for x in (self.hidden, self.labels, slope))
        for at, (rows, labels, upstream) in enumerate(zip(*chunks, strict=True)):
            z = F.linear(rows, self.weight).requires_grad_()
            (dz,) = torch.autograd.grad(plain_logps(z, labels), z, upstream)
            here = self.tokens - at * self.rows
            of_tokens.append(dz[here[(here >= 0) & (here < len(rows))]])
            of_words.append(dz[:, words])
        dweight = torch.cat(of_words).t() @ self.hidden
        parts = dweight.split([len(x) for x in self.words.values()])
        return {"dhidden": torch.cat(of_tokens) @ self.weight} | dict(
            zip(self.words, parts, strict=True)
        )

    def sample(self, dhidden: Tensor, dweight: Tensor) -> dict[str, Tensor]:
        """The same samples of gradients that a contender returned."""
        of_words = {name: dweight[words] for name, words in self.words.items()}
        return {"dhidden": dhidden.flatten(0, 1)[self.tokens]} | of_words


def _rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def check(
    contender: Contender, truth: Truth, value: Tensor, gradients: tuple[Tensor, Tensor] | None
) -> Parity:
    """used: the largest error as a share of what it may be."""
    exact = truth.of(contender.objective)
    multiple = OURS[truth.hidden.dtype] if contender.ours else MULTIPLE
    shares: dict[str, float] = {}
    if gradients is None:
        error = _rms(value.flatten() - exact.value)
        shares["log-probs"], over = error / (multiple * exact.error), [error / exact.error]
    else:
        # A single number: held to no more than the expected error, a right one would often fail.
        rounding = output_rounding(exact.value, torch.zeros_like(exact.value), value.dtype, 0.5)
        limit = MULTIPLE * exact.error + exact.floor + rounding.item()
        shares["loss"] = (value - exact.value).abs().item() / limit
        over = []
        for name, sample in truth.sample(*gradients).items():
            error, plain = _rms(sample - exact.gradients[name]), exact.gradient_errors[name]
            # Where plain torch is exact, so must others be.
            over.append(error / plain if plain else torch.inf if error else 0.0)
            # Cross-entropies are there for their times: CCE leaves small gradients out.
            if contender.objective is not cross_entropy:
                shares[name] = over[-1] / multiple
    faults = [
        f"{name}: {x:.3g} times the allowed error" for name, x in shares.items() if not x <= 1
    ]
    return Parity(max(shares.values()), max(over), faults)


# Then time.


@dataclass
class Entry:
    """A contender at one shape."""

    contender: Contender
    row: Row
    hidden: Tensor
    weight: Tensor
    task: Task
    watch: Stopwatch
    function: Function = field(init=False)
    steps: list[list[float]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Nothing has been said against it."""
        return "status" not in self.row

    def prepare(self, truth: Truth) -> None:
        """Parity, then peak memory."""
        reason = self.make()
        if reason is not None:
            self.row["status"] = f"no: {reason}"
            return
        results = self.step()
        if self.contender is not PRODUCTS:
            parity = check(self.contender, truth, *results)
            self.row |= {"limit_used": parity.used, "rms_over_eager": parity.against_eager}
            if parity.faults:
                self.row["status"] = "wrong: " + "; ".join(parity.faults)
                return
        del results
        peak = peak_memory(self.step, self.hidden.device)
        if peak is not None:
            returns = self.contender is PRODUCTS or self.contender.objective is not None
            returned = self.hidden.nbytes + self.weight.nbytes if returns else 0
            self.row |= {"peak_bytes": peak, "scratch_bytes": max(0, peak - returned)}

    def make(self) -> str | None:
        """The function, or why there is none."""
        if free_memory(self.hidden.device) < self.contender.needs(self.row):
            return "too little memory"
        reason = self.contender.why_not(self.hidden)
        if reason is not None:
            return reason
        try:
            self.function = self.contender.make()
        except ImportError as error:
            return f"{error} (benchmarks/requirements.txt)"
        return None

    def step(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """One forward and backward under the watch: (value, gradients)."""
        if self.contender.objective is None:
            with torch.no_grad():
                self.watch.start()
                value = self.function(self.hidden, self.weight, self.task)
                self.watch.mark()
            return value, None
        try:
            self.watch.start()
            value = self.function(self.hidden, self.weight, self.task)
            self.watch.mark()
            value.backward()
            self.watch.mark()
            # Freed by the caller, after the clock has stopped.
            return value.detach(), (self.hidden.grad, self.weight.grad)
        finally:
            self.hidden.grad = self.weight.grad = None

    def time(self, warm_ups: int) -> None:
        for _ in range(warm_ups):
            self.step()
        results = self.step()
        self.steps.append(self.watch.laps())
        self.host.append(self.watch.host)
        del results

    def attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except torch.OutOfMemoryError:
            self.row["status"] = "no: out of memory"
        except Exception as error:
            self.row["status"] = f"failed: {type(error).__name__}: {error}"
            print(f"{self.contender.name}: {error}", file=sys.stderr)


def cell(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    entrants: list[Contender],
    rounds: int,
) -> list[Row]:
    """All entrants at one shape (n, v, h)."""
    hidden, weight = inputs(shape, dtype, device)
    task = make_batch(hidden, weight)
    truth = Truth(hidden, weight, task)
    return compare({}, hidden, weight, task, truth, entrants, rounds)


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Hidden states and a head that logits of a standard deviation of SPREAD come from."""
    n, v, h = shape
    sequences = sequences_of(n)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(sequences, n // sequences, h, dtype=dtype, device=device)
    hidden.normal_(generator=generator).requires_grad_()
    weight = torch.empty(v, h, dtype=dtype, device=device)
    weight.normal_(0, SPREAD / h**0.5, generator=generator).requires_grad_()
    return hidden, weight


def compare(
    base: Row,
    hidden: Tensor,
    weight: Tensor,
    task: Task,
    truth: Truth,
    entrants: Sequence[Contender],
    rounds: int,
    warm_ups: int = 0,
) -> list[Row]:
    """A row of each, the products first.

    base: what they say besides of what was drawn. warm_ups: steps before each that is timed.
    """
    # Code compiled for the shapes before is in no one's way.
    torch._dynamo.reset()
    (v, h), n, device = weight.shape, task.labels.numel(), hidden.device
    base = base | {"n": n, "v": v, "h": h, "dtype": str(hidden.dtype).removeprefix("torch.")}
    watch = Stopwatch(device)
    bare = hidden, weight
    if multiplies_in_float32(hidden, hidden.dtype):
        bare = tuple(x.detach().float().requires_grad_() for x in bare)
    entries = [
        Entry(contender, base | {"contender": contender.name}, *given, task, watch)
        for contender, given in ((PRODUCTS, bare), *((x, (hidden, weight)) for x in entrants))
    ]
    for entry in entries:
        started = time.perf_counter()
        entry.attempt(entry.prepare, truth)
        found = "right" if entry.runs else entry.row["status"]
        print(
            f"  {entry.contender.name}: {found}, {time.perf_counter() - started:.0f} s",
            file=sys.stderr,
        )
    for _ in range(rounds):
        for entry in entries:
            if entry.runs:
                entry.attempt(entry.time, warm_ups)
    for entry in entries:
        if entry.runs:
            entry.row |= timed(entry.steps)
            if device.type == "cuda":
                entry.row["host_ms"] = Spread.of(entry.host).median

    products = entries[0].row.get("both_ms")
    own = [e.row.get("both_ms") for e in entries if is_ours(e.contender)]
    best = min((x for x in own if x is not None), default=None)
    for row, contender in ((e.row, e.contender) for e in entries if "both_ms" in e.row):
        if products is not None:
            row["over_products"] = row["both_ms"] / products
        if best is not None and contender.objective is not None:
            row["over_ours"] = row["both_ms"] / best
    return [entry.row for entry in entries]


def is_ours(contender: Contender) -> bool:
    """Ours as one would call it: the loss with its defaults."""
    return contender.ours and contender.objective is plain_objective


def title(row: Row) -> str:
    """Of the cell that it is in."""
    sets = f", sets: {row['sizes']}" if "sizes" in row else ""
    return f"{row['n']} tokens, vocabulary {row['v']}, width {row['h']}, {row['dtype']}{sets}"


def show(rows: list[Row]) -> None:
    """A table of one cell."""
    print(
        f"\n{title(rows[0])}\n"
        f"{'':24}{TIMES}{'peak MB':>9}{'products':>10}{'ours':>8}  {'limit':>6} {'eager':>5}"
    )

    def number(row: Row, name: str, form: str, unit: float = 1.0) -> str:
        width = int(form.partition(".")[0])
        return f"{row[name] / unit:{form}}" if name in row else " " * width

    for row in rows:
        if row["status"] != "timed":
            print(f"{row['contender']:24}  {row['status']}")
            continue
        print(
            f"{row['contender']:24}{times_text(row)}{number(row, 'scratch_bytes', '9.0f', 1e6)}"
            f"{number(row, 'over_products', '10.3g')}{number(row, 'over_ours', '8.3g')}"
            f"  {number(row, 'limit_used', '6.2f')} {number(row, 'rms_over_eager', '5.2f')}"
        )


LEGEND = """
ms: median ± interquartile range. peak: memory above the inputs, less the size of the two gradients
where these are returned. products: time over that of the three products in the first row. ours:
time over that of our loss with its defaults, which is its speed-up. limit: the largest share of the
allowed error. eager: the largest RMS error, of samples of the gradients or of the log-probs, over
plain torch's.
Liger has λ = 0; linear_cross_entropy and CCE compute another loss, the cross-entropy, and are held
to its value alone. On a CPU linear_cross_entropy takes 1024 tokens at a time: its own choice of 8
would need minutes a step."""


def plot(path: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """Two panels for each shape: milliseconds against the products, memory against the logits."""
    from matplotlib.figure import Figure

    cells: dict[str, list[Row]] = {}
    for row in rows:
        if "over_products" in row and row["contender"] != PRODUCTS.name:
            cells.setdefault(title(row), []).append(row)
    if not cells:
        return
    bars = max(map(len, cells.values()))
    size = 13, 0.8 + len(cells) * (0.9 + 0.28 * bars)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(cells), 2, sharey="row", squeeze=False)
    for (name, shown), (left, right) in zip(cells.items(), panels, strict=True):
        times = {r["contender"]: (r["both_ms"], r["both_iqr_ms"]) for r in shown}
        products = shown[0]["both_ms"] / shown[0]["over_products"]
        draw_bars(left, times, products, "three products")
        left.set_title(f"{name}: ms")
        memory = {
            # A logarithm takes no 0.
            r["contender"]: (max(1.0, r["scratch_bytes"] / 1e6), 0.0)
            for r in shown
            if "scratch_bytes" in r
        }
        first = shown[0]
        logits = first["n"] * first["v"] * getattr(torch, first["dtype"]).itemsize / 1e6
        draw_bars(right, memory, logits, "the logits")
        right.set_title("peak memory, MB")
    panels[-1, 0].set_xlabel(
        f"forward and backward (log-probs: forward alone)\n"
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    )
    panels[-1, 1].set_xlabel("above the inputs, less the size of the gradients")
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a contender of ours was wrong or failed."""
    everyone = {c.name: c for c in contenders()}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--n", type=int, nargs="+", help="tokens, at least 2 (default: 1024)")
    add("--v", type=int, nargs="+", help="vocabularies (default: 151936)")
    add("--h", type=int, nargs="+", help="widths of the hidden states (default: 1024)")
    add("--full", action="store_true", help="the large grid, for what --n, --v, --h leave open")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add_options(parser, everyone, rounds=3)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    grid = FULL[device.type] if options.full else SHORT
    ns, vs, hs = (getattr(options, name) or grid[name] for name in "nvh")
    if min(ns) < 2:
        parser.error("--n: at least 2")
    entrants = [everyone[name] for name in options.contenders or everyone]

    machine = begin(options) | {"cut_cross_entropy": version_of("cut-cross-entropy")}
    cells = (
        cell(shape, getattr(torch, options.dtype), device, entrants, options.rounds)
        for shape in itertools.product(ns, vs, hs)
    )
    mine = [c.name for c in everyone.values() if c.ours]
    return report(options.out / "linear", cells, COLUMNS, machine, show, plot, LEGEND, mine)


if __name__ == "__main__":
    sys.exit(main())
