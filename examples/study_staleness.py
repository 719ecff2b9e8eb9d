"""Does the soft brake do what it promises? Clipping against ratio variance on stale data.

    python examples/study_staleness.py          # a short form, under 10 minutes on two cores
    python examples/study_staleness.py --full   # all of it, with its sweep: 80 minutes
    python examples/study_report.py             # tables and figures of what has been run so far

The small transformer of train_tiny.py learns from rollouts that are 0 to 5 policy updates old. An
update is one pass over a batch of rollouts, 32 groups of 8 completions, in 4 optimizer steps. At
age k it takes the batch that the policy of k updates before sampled (the first k, that which all
start from): every run has the same number of rollouts and of optimizer steps. With reuse r a batch
serves r updates in a row, so that the same optimizer steps cost 1/r of the rollouts.

Two tasks. "sort": the digits in order; the reward is the share of right digits. "rare": the model
has been taught to sort upwards, and downwards one time in ten; only an answer that is downwards and
right to the last digit is rewarded. So few rollouts earn anything, by tokens of low probability.

How strictly a method holds the ratio is one number, ε: PPO clips ρ to 1 ± ε (clip-higher to 1.4·ε
above), λ is 1/(2ε), SPO's is |A|/(2ε), and the dual and Fenchel's closed form hold E[(ρ - c)²] at
ε². The learning rate and ε of each are chosen by the same sweep, on seeds of its own, which the
full form runs first and the short form reads from examples/study/. "ppo-clip" and "clip-higher"
keep the ε = 0.2 that they are known by; "ppo-tuned" is PPO's clip with its own chosen, as the
others have. The sweep also tries other steps of the dual, and the additive form of its update.

Each finished run is appended to a CSV in --out at once, and a run that stands there is not run
again: stop and start as you like.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from study_runs import Objective, Row, RunFiles, pooled, study_options
from torch import Tensor, nn
from train_tiny import (
    GROUP,
    HELD_OUT,
    IGNORE,
    TinyTransformer,
    answers,
    complete,
    completion_labels,
    group_advantages,
    make_prompts,
    right_digits,
    warm_up,
)

from r2vpo_kernels import R2VPOOutput, r2vpo_loss, token_logps

WIDTH, HEADS, PROMPTS, MINIBATCHES = 48, 2, 32, 4
UPDATES, RECORD_EVERY = 40, 5
METHODS = (
    "ppo-clip", "clip-higher", "ppo-tuned", "none", "spo",
    "fixed-one", "fixed-group", "dual-one", "dual-group", "fenchel-one", "fenchel-group",
)  # fmt: skip
# "ppo-tuned" chooses from what is tried of "ppo-clip".
SWEPT = tuple(method for method in METHODS if method != "ppo-tuned")
# (age, reuse)
SETTINGS = [(0, 1), (1, 1), (2, 1), (3, 1), (5, 1), (0, 2)]
SHORT_SETTINGS = [(0, 1), (5, 1)]
SEEDS = range(5)
# What the sweep tries, on seeds and at ages of its own.
SWEEP_SEEDS, SWEEP_AGES = range(100, 102), (1, 5)
RATES = {"sort": (3e-4, 1e-3), "rare": (1e-4, 3e-4)}
EPSILON, EPSILONS = 0.2, (0.2, 1.0, 5.0)
DUAL_LR, DUAL_LRS, ADDITIVE_LRS = 0.1, (0.03, 0.3), (0.03, 0.3, 3.0)
SWEEP = Path(__file__).parent / "study" / "sweep.csv"

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # tokens, labels, old_logps, advantages


@dataclass(frozen=True)
class Task:
    warm_up: float  # greedy success on what is taught, at which the warm-up ends
    teach: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]  # (B, DIGITS): where a completion is right
    reward: Callable[[Tensor], Tensor]  # of that, (B,)


def mostly_upwards(prompts: Tensor) -> Tensor:
    downwards = torch.rand(len(prompts), 1) < 0.1
    return torch.where(downwards, answers(prompts).flip(1), answers(prompts))


def right_downwards(tokens: Tensor) -> Tensor:
    right = answers(tokens).flip(1)
    return tokens[:, -right.shape[1] :] == right


TASKS = {
    "sort": Task(0.5, answers, right_digits, lambda right: right.float().mean(1)),
    "rare": Task(0.99, mostly_upwards, right_downwards, lambda right: right.all(1).float()),
}


@dataclass(frozen=True)
class Run:
    """One training run: all that its outcome depends on, but for the code."""

    task: str
    method: str
    age: int
    reuse: int
    seed: int
    lr: float
    epsilon: float = EPSILON
    dual_lr: float = DUAL_LR
    updates: int = UPDATES


class Method(Objective):
    def __init__(self, run: Run) -> None:
        super().__init__(run.method, run.epsilon, run.dual_lr)

    def loss(
        self, logits: Tensor, labels: Tensor, old_logps: Tensor, advantages: Tensor
    ) -> R2VPOOutput:
        groups = torch.arange(len(advantages)) // GROUP
        out = r2vpo_loss(
            logits, labels, old_logps, advantages, group_size=GROUP, return_entropy=True,
            **self.keywords(advantages, groups, len(advantages) // GROUP),
        )  # fmt: skip
        self.step(out.stats)
        return out


def starting_policy(name: str, folder: Path) -> TinyTransformer:
    """Where all runs of a task start from, kept in `folder`."""
    task, path = TASKS[name], folder / f"{name}.pt"
    torch.manual_seed(0)
    model = TinyTransformer(WIDTH, heads=HEADS)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    warm_up(model, task.warm_up, torch.Generator().manual_seed(0), task.teach)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model


def would_clip(out: R2VPOOutput, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """Whose gradient PPO's clip at ε = 0.2 would cut, of the tokens as they lie."""
    change = (out.logps - old_logps).exp() - 1
    return advantages.sign()[:, None] * change > EPSILON


def train(run: Run, policies: Path) -> list[Row]:
    """A row at the start, and one for each RECORD_EVERY updates, of means over their steps."""
    task, method = TASKS[run.task], Method(run)
    model = starting_policy(run.task, policies)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr, fused=True)
    generator = torch.Generator().manual_seed(run.seed)
    held_out = make_prompts(HELD_OUT, torch.Generator().manual_seed(2**31))

    def success() -> float:
        tokens = complete(model, held_out, torch.Generator().manual_seed(2**31))
        return task.right(tokens).all(1).float().mean().item()

    def rollouts() -> Batch:
        prompts = make_prompts(PROMPTS, generator).repeat_interleave(GROUP, dim=0)
        tokens = complete(model, prompts, generator)
        labels = completion_labels(tokens)
        with torch.no_grad():
            old_logps = token_logps(model(tokens), labels)
        return tokens, labels, old_logps, group_advantages(task.reward(task.right(tokens)))

    rows: list[Row] = [{"update": 0, "success": success()}]
    sums: dict[str, float] = defaultdict(float)
    queue = deque(rollouts() for _ in range(run.age))
    for update in range(run.updates):
        if update % run.reuse == 0:
            queue.append(rollouts())
            batch = queue.popleft()
        # Groups stay whole, for the centre "group".
        for groups in torch.randperm(PROMPTS, generator=generator).chunk(MINIBATCHES):
            part = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
            tokens, labels, old_logps, advantages = (x[part] for x in batch)
            out = method.loss(model(tokens), labels, old_logps, advantages)
            optimizer.zero_grad()
            out.loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            cut = would_clip(out, old_logps, advantages)[labels != IGNORE]
            measured = {
                "ratio_var": pooled(out.stats, method.center),
                "coef": method.coef,
                "cut": cut.float().mean(),
                "grad_norm": norm,
                "entropy": out.entropy[labels != IGNORE].mean(),
            }
            for name, value in measured.items():
                sums[name] += value.item() / (RECORD_EVERY * MINIBATCHES)
        if (update + 1) % RECORD_EVERY == 0:
            rows.append({"update": update + 1, "success": success(), **sums})
            sums.clear()
    return rows


MEASURED = ["update", "success", "ratio_var", "coef", "cut", "grad_norm", "entropy"]
FILES = RunFiles(Run, MEASURED)


def mean_success(rows: list[Row]) -> float:
    """Over the whole of training: what is learned sooner counts for more."""
    return sum(row["success"] for row in rows) / len(rows)


def tried(task: str, method: str) -> list[dict[str, float]]:
    """The hyper-parameters that the sweep tries for a method."""
    epsilons = (EPSILON,) if method == "none" else EPSILONS
    return [{"lr": lr, "epsilon": e} for lr, e in itertools.product(RATES[task], epsilons)]


def sweep_runs() -> list[Run]:
    return [
        Run(task, method, age, 1, seed, **values)
        for seed, task, method, age in itertools.product(SWEEP_SEEDS, TASKS, SWEPT, SWEEP_AGES)
        for values in tried(task, method)
    ]


def chosen(sweep: dict[Run, list[Row]]) -> dict[tuple[str, str], dict[str, float]]:
    """(task, method) → the values of the highest mean success over the sweep's ages and seeds."""
    scores: dict[tuple[str, str], dict[tuple[float, float], float]] = defaultdict(dict)
    for task, method in itertools.product(TASKS, METHODS):
        swept = "ppo-clip" if method == "ppo-tuned" else method
        for values in tried(task, method):
            if method in ("ppo-clip", "clip-higher") and values["epsilon"] != EPSILON:
                continue
            of_values = [
                mean_success(rows)
                for run, rows in sweep.items()
                if replace(run, age=0, seed=0) == Run(task, swept, 0, 1, 0, **values)
            ]
            if of_values:
                score = sum(of_values) / len(of_values)
                scores[task, method][values["lr"], values["epsilon"]] = score
    return {
        key: dict(zip(("lr", "epsilon"), max(of_key, key=of_key.__getitem__), strict=True))
        for key, of_key in scores.items()
    }


def dual_runs(sweep: dict[Run, list[Row]]) -> list[Run]:
    """Other steps of the dual, and the other form of its update, at the rates chosen for it."""
    rates = {task: chosen(sweep)[task, "dual-one"]["lr"] for task in TASKS}
    steps = [("dual-one", DUAL_LRS), ("additive-one", ADDITIVE_LRS)]
    return [
        Run(task, method, age, 1, seed, rates[task], epsilon, dual_lr)
        for seed, task, age, epsilon in itertools.product(
            SWEEP_SEEDS, TASKS, SWEEP_AGES, EPSILONS[:2]
        )
        for method, dual_lrs in steps
        for dual_lr in dual_lrs
    ]


def result_runs(
    values: dict[tuple[str, str], dict[str, float]], settings: list[tuple[int, int]], seeds: range
) -> list[Run]:
    return [
        Run(task, method, age, reuse, seed, **values[task, method])
        for seed, task, (age, reuse), method in itertools.product(seeds, TASKS, settings, METHODS)
    ]


def finish(name: str, runs: list[Run], path: Path, workers: int) -> None:
    """Train those of the runs that do not stand in the file yet, and append them to it."""
    policies = path.parent / "policies"
    done = FILES.read(path)
    for task in {run.task for run in runs if run not in done}:
        starting_policy(task, policies)
    FILES.finish(name, runs, path, partial(train, policies=policies), workers)


def main() -> None:
    full, out, workers = study_options(
        __doc__.partition("\n")[0],
        "the sweep, all ages, 5 seeds: some 80 minutes on two cores",
        default="study",
    )
    torch.set_num_threads(1)
    sweep, settings, seeds = SWEEP, SHORT_SETTINGS, SEEDS[:2]
    if full:
        sweep, settings, seeds = out / "sweep.csv", SETTINGS, SEEDS
        finish("sweep", sweep_runs(), sweep, workers)
        finish("dual's steps", dual_runs(FILES.read(sweep)), sweep, workers)
    runs = result_runs(chosen(FILES.read(sweep)), settings, seeds)
    finish("results", runs, out / "results.csv", workers)


if __name__ == "__main__":
    main()
