"""Continuous control: PPO with its clip, and with the ratio's variance held instead.

    python examples/continuous_control.py          # a short form, under 10 minutes on two cores
    python examples/continuous_control.py --full   # all of it, with its sweep: some 5 hours
    python examples/control_report.py              # tables and figures of what has been run so far

PPO as its well-known single-file implementations have it (observations and rewards normalised,
orthogonal initialisation, GAE, ten epochs of minibatches over each batch of rollouts, advantages
normalised per minibatch, a clipped value loss, a learning rate that falls to 0). Only the policy's
loss varies, and it is one call: `Method.loss` below. A step's log-prob is that of the whole action,
and is to the package what a token's is: the ratio, its clip and its variance are taken per step.

How strictly a method holds the ratio is one number, ε: PPO clips ρ to 1 ± ε, a fixed λ is 1/(2ε),
and the target that the dual and Fenchel's closed form have for E[(ρ - c)²] is ε². The centre c is
one, or the mean of a group: the steps of one environment in one batch of rollouts. Learning rate
and ε of each method are chosen by the same sweep, over tasks together, on seeds of its own, which
the full form runs first and the short form reads from examples/control/. The values chosen serve
for reuse too. "Neighbours" are the main runs again, on the sweep's tasks, with the next larger and
the next smaller ε.

Reuse: with reuse r an update trains on the last r batches of rollouts, in minibatches r times as
large, so that data is up to r - 1 updates old and the number of optimizer steps is the same.
Advantages are recomputed with the value function of the update's start. "behaviour" takes the ratio
to the policy that sampled; "weighted" takes it to the policy of the update's start, and weights
each step's advantage by the ratio between the two, cut at MAX_WEIGHT (decoupled PPO,
arXiv:2110.00641).

Each finished run is appended to a CSV in --out at once, and a run that stands there is not run
again: stop and start as you like.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from control_tasks import EPISODE, TASKS, make_environments
from study_runs import Objective, Row, RunFiles, Runs, pooled, study_options
from torch import Tensor, nn

from r2vpo_kernels import R2VPOOutput, r2vpo_loss_from_logps

ENVIRONMENTS, HORIZON = 16, 128
BATCH = ENVIRONMENTS * HORIZON
EPOCHS, MINIBATCHES = 10, 4
GAMMA, GAE_LAMBDA = 0.99, 0.95
VALUE_CLIP, VALUE_COEF, MAX_GRAD_NORM = 0.2, 0.5, 0.5
MAX_WEIGHT = 5.0
DUAL_LR = 0.1
PPO_CLIP = 0.2  # what the share of clipped steps is measured by, for all methods
RECORDS = 20

# With advantages normalised per minibatch, their root mean square is 1, and Fenchel's λ about one
# is a fixed λ = 1/(2ε). It is another method only where weights multiply the advantages.
METHODS = (
    "ppo-clip", "none", "fixed-one", "fixed-group", "dual-one", "dual-group", "fenchel-group",
)  # fmt: skip
RIVAL = METHODS[0]
REUSE_METHODS = ("ppo-clip", "fixed-one", "dual-one", "fenchel-one")
# Besides the one batch of the main runs.
REUSES, CORRECTIONS = (2, 4, 6), ("behaviour", "weighted")
REUSE_TASKS = SWEEP_TASKS = ("cheetah-run", "ball_in_cup-catch", "cheetah-run-changing")
# What was looked at before the sweep had seed 0.
SEEDS, REUSE_SEEDS, SWEEP_SEEDS = range(1, 6), range(1, 4), range(100, 102)
UPDATES = 500_000 // BATCH
SWEEP_UPDATES, SHORT_UPDATES = 3 * UPDATES // 5, UPDATES // 2
# What the sweep tries; the neighbours of what it chose reach one step further.
WIDER_EPSILONS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
RATES, EPSILONS = (3e-4, 1e-3), WIDER_EPSILONS[1:-1]
NEIGHBOUR_METHODS = ("ppo-clip", "fixed-one", "dual-one", "dual-group")
# The clip alone, for as many steps as CleanRL's published results have, where UPDATES fall short;
# also with CleanRL's learning rate, as the sweep chooses for shorter runs.
BASELINE_UPDATES, BASELINE_SEEDS = 8_000_000 // BATCH, range(1, 2)
BASELINE_TASKS = ("cartpole-swingup_sparse", "finger-turn_hard", "reacher-hard")
SHORT_METHODS = ("ppo-clip", "fixed-one", "dual-one")
SWEEP = Path(__file__).parent / "control" / "sweep.csv"


@dataclass(frozen=True)
class Run:
    """One training run: all that its outcome depends on, but for the code."""

    task: str
    method: str
    reuse: int
    correction: str  # of CORRECTIONS
    seed: int
    lr: float
    epsilon: float
    updates: int = UPDATES


BY_AGE = ("moment", "cut", "ess")
MEASURED = [
    "update", "return", "ratio_var", "coef", "cut", "weight_ess", "std", "explained",
    *(f"{name}_age{age}" for name in BY_AGE for age in range(max(REUSES))),
]  # fmt: skip
FILES = RunFiles(Run, MEASURED)


class Agent(nn.Module):
    """A Gaussian policy whose standard deviation does not depend on the state; and a value."""

    def __init__(self, observation: int, action: int) -> None:
        super().__init__()
        self.mean = self._network(observation, action, gain=0.01)
        self.value = self._network(observation, 1, gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(action))

    @staticmethod
    def _network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
        layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
        for layer, scale in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
            nn.init.orthogonal_(layer.weight, scale)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def logps(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-probs of whole actions, nats: the sum over the actuators."""
        z = (actions - self.mean(observations)) * (-self.log_std).exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def values(self, observations: Tensor) -> Tensor:
        return self.value(observations).squeeze(-1)


@dataclass
class Rollouts:
    """A batch of T steps in each of N environments; observations have the one after the last."""

    observations: Tensor  # (T + 1, N, size)
    actions: Tensor  # (T, N, actuators)
    logps: Tensor  # (T, N), of the policy that sampled
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    ended: Tensor  # (T, N), by termination or by the time limit
    valid: Tensor  # (T, N), False where the environment was being reset


class Sampler:
    """Rollouts in the run's environments, and the returns of the episodes that ended in them."""

    def __init__(self, run: Run) -> None:
        self.environments = make_environments(run.task, ENVIRONMENTS, run.seed, GAMMA)
        self.generator = torch.Generator().manual_seed(run.seed)
        self.observations, _ = self.environments.reset()
        self.was_ended = np.zeros(ENVIRONMENTS, dtype=bool)
        self.returns: list[float] = []

    def set_gains(self, gains: tuple[float, ...]) -> None:
        self.environments.unwrapped.gains[:] = gains

    @torch.no_grad()
    def rollouts(self, agent: Agent) -> Rollouts:
        std = agent.log_std.exp()
        steps = []
        for _ in range(HORIZON):
            mean = agent.mean(torch.from_numpy(self.observations))
            actions = mean + std * torch.randn(mean.shape, generator=self.generator)
            observations, rewards, terminated, truncated, info = self.environments.step(
                actions.numpy()
            )
            ended = terminated | truncated
            if ended.any():
                self.returns += info["episode"]["r"][ended].tolist()
            steps.append((self.observations, actions, rewards, terminated, ended, ~self.was_ended))
            self.observations, self.was_ended = observations, ended
        before, actions, *rest = (np.stack(x) for x in zip(*steps, strict=True))
        observations = torch.from_numpy(np.concatenate([before, self.observations[None]]))
        actions = torch.from_numpy(actions)
        logps = agent.logps(observations[:-1], actions)
        rewards, terminated, ended, valid = (torch.from_numpy(x) for x in rest)
        return Rollouts(observations, actions, logps, rewards.float(), terminated, ended, valid)


def advantages_of(rollouts: Rollouts, values: Tensor) -> Tensor:
    """GAE, (T, N), with the values (T + 1, N) of all observations.

    An episode that the time limit cut short is worth what the value function says of its last
    observation, which is the next row's, as the reset comes after it; only termination is worth 0.
    """
    next_values = torch.where(rollouts.terminated, 0.0, values[1:])
    deltas = rollouts.rewards + GAMMA * next_values - values[:-1]
    carried = GAMMA * GAE_LAMBDA * (~rollouts.ended).float()
    advantages = torch.empty_like(deltas)
    later = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        later = deltas[t] + carried[t] * later
        advantages[t] = later
    return advantages


@dataclass
class Batch:
    """The valid steps that an update trains on, all (steps, ...)."""

    observations: Tensor
    actions: Tensor
    old_logps: Tensor
    importance_weights: Tensor
    advantages: Tensor
    values: Tensor  # at the update's start
    group_ids: Tensor  # age * ENVIRONMENTS + environment

    def part(self, steps: Tensor) -> Batch:
        return Batch(*(x[steps] for x in vars(self).values()))


@torch.no_grad()
def batch_of(kept: Iterable[Rollouts], agent: Agent, weighted: bool) -> Batch:
    """Of the kept rollouts, the latest first, as the agent now values them."""
    parts = []
    for age, rollouts in enumerate(kept):
        observations, valid = rollouts.observations[:-1], rollouts.valid
        values = agent.values(rollouts.observations)
        old_logps, weights = rollouts.logps, torch.ones_like(rollouts.logps)
        if weighted:
            old_logps = agent.logps(observations, rollouts.actions)
            weights = (old_logps - rollouts.logps).exp().clamp(max=MAX_WEIGHT)
        groups = (age * ENVIRONMENTS + torch.arange(ENVIRONMENTS)).expand_as(valid)
        advantages = advantages_of(rollouts, values)
        of_steps = (
            observations, rollouts.actions, old_logps, weights, advantages, values[:-1], groups,
        )  # fmt: skip
        parts.append([x[valid] for x in of_steps])
    return Batch(*(torch.cat(x) for x in zip(*parts, strict=True)))


class Method(Objective):
    def __init__(self, run: Run) -> None:
        super().__init__(run.method, run.epsilon, DUAL_LR)

    def loss(self, logps: Tensor, batch: Batch, num_groups: int) -> R2VPOOutput:
        x = batch.advantages
        advantages = (x - x.mean()) / (x.std(correction=0) + 1e-8)
        out = r2vpo_loss_from_logps(
            logps,
            batch.old_logps,
            advantages,
            importance_weights=batch.importance_weights,
            group_ids=batch.group_ids,
            num_groups=num_groups,
            **self.keywords(advantages * batch.importance_weights, batch.group_ids, num_groups),
        )
        self.step(out.stats)
        return out


def value_loss(values: Tensor, batch: Batch) -> Tensor:
    targets = batch.advantages + batch.values
    clipped = batch.values + (values - batch.values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * torch.maximum((values - targets) ** 2, (clipped - targets) ** 2).mean()


def would_clip(out: R2VPOOutput, batch: Batch) -> Tensor:
    """Whose gradient PPO's usual clip would cut."""
    change = (out.logps - batch.old_logps).exp() - 1
    centred = batch.advantages - batch.advantages.mean()
    return centred.sign() * change > PPO_CLIP


def by_age(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_age{age}": value for age, value in enumerate(values)}


def measures(out: R2VPOOutput, batch: Batch, method: Method) -> dict[str, Tensor]:
    """Of one optimizer step; by age, the ratio's second moment about one and what PPO cuts."""
    stats = out.stats.weight, out.stats.d_sq_sum
    weight, d_sq_sum = (x.view(-1, ENVIRONMENTS).sum(1) for x in stats)
    cut = would_clip(out, batch).float()
    cut_of_ages = torch.zeros_like(weight).index_add(0, batch.group_ids // ENVIRONMENTS, cut)
    return {
        "ratio_var": pooled(out.stats, method.center),
        "coef": method.coef,
        "cut": cut.mean(),
        **by_age("moment", d_sq_sum / weight),
        **by_age("cut", cut_of_ages / weight),
    }


def effective_share(weights: Tensor) -> Tensor:
    """The effective sample size over the number of samples."""
    return weights.mean() ** 2 / (weights**2).mean()


def train(run: Run) -> list[Row]:
    """RECORDS rows, each of means over its part of the run."""
    torch.manual_seed(run.seed)
    sampler, method = Sampler(run), Method(run)
    spaces = sampler.environments
    agent = Agent(spaces.single_observation_space.shape[0], spaces.single_action_space.shape[0])
    optimizer = torch.optim.Adam(agent.parameters(), lr=run.lr, eps=1e-5, fused=True)
    gains = TASKS[run.task].gains
    kept: deque[Rollouts] = deque(maxlen=run.reuse)
    rows: list[Row] = []
    measured: dict[str, list[Tensor]] = defaultdict(list)
    for update in range(run.updates):
        optimizer.param_groups[0]["lr"] = run.lr * (1 - update / run.updates)
        if gains:
            sampler.set_gains(gains[len(gains) * update // run.updates])
        kept.appendleft(sampler.rollouts(agent))
        batch = batch_of(kept, agent, run.correction == "weighted")
        num_groups = len(kept) * ENVIRONMENTS
        for _ in range(EPOCHS):
            order = torch.randperm(len(batch.advantages), generator=sampler.generator)
            for steps in order.chunk(MINIBATCHES):
                part = batch.part(steps)
                out = method.loss(agent.logps(part.observations, part.actions), part, num_groups)
                loss = out.loss + VALUE_COEF * value_loss(agent.values(part.observations), part)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                for name, value in measures(out, part, method).items():
                    measured[name].append(value)
        weights, ages = batch.importance_weights, batch.group_ids // ENVIRONMENTS
        measured["weight_ess"].append(effective_share(weights))
        for age in range(len(kept)):
            measured[f"ess_age{age}"].append(effective_share(weights[ages == age]))
        measured["std"].append(agent.log_std.detach().exp().mean())
        residual = batch.advantages.var() / (batch.advantages + batch.values).var()
        measured["explained"].append(1 - residual)
        if RECORDS * (update + 1) // run.updates > RECORDS * update // run.updates:
            row = {name: torch.stack(x).mean().item() for name, x in measured.items()}
            returns = sampler.returns
            row["return"] = sum(returns) / len(returns) if returns else math.nan
            rows.append({"update": update + 1, **row})
            measured.clear()
            returns.clear()
    spaces.close()
    return rows


def mean_return(rows: list[Row]) -> float:
    """Over the whole of training, of the highest possible: what is learned sooner counts more."""
    returns = [row["return"] for row in rows if not math.isnan(row["return"])]
    return sum(returns) / len(returns) / EPISODE


def tried(method: str) -> list[dict[str, float]]:
    """The hyper-parameters that the sweep tries for a method."""
    epsilons = EPSILONS[:1] if method == "none" else EPSILONS
    return [{"lr": lr, "epsilon": e} for lr, e in itertools.product(RATES, epsilons)]


def sweep_runs() -> list[Run]:
    return [
        Run(task, method, 1, "behaviour", seed, **values, updates=SWEEP_UPDATES)
        for seed, task, method in itertools.product(SWEEP_SEEDS, SWEEP_TASKS, METHODS)
        for values in tried(method)
    ]


def sweep_scores(sweep: Runs) -> dict[tuple[str, float, float], float]:
    """(method, lr, ε) → the mean over tasks of the mean return over seeds, each as a share of the
    highest on its task: else the task with the largest returns would decide alone.
    """
    returns: dict[str, dict[tuple[str, float, float], list[float]]] = {}
    for run, rows in sweep.items():
        of_task = returns.setdefault(run.task, defaultdict(list))
        of_task[run.method, run.lr, run.epsilon].append(mean_return(rows))
    shares: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for of_task in returns.values():
        means = {values: sum(x) / len(x) for values, x in of_task.items()}
        highest = max(means.values())
        for values, mean in means.items():
            shares[values].append(mean / highest if highest else 0.0)
    return {values: sum(x) / len(x) for values, x in shares.items()}


def chosen(sweep: Runs) -> dict[str, dict[str, float]]:
    """method → the values of the highest score."""
    found = sweep_scores(sweep)
    result = {}
    for method in METHODS:
        of_method = [values for values in found if values[0] == method]
        if of_method:
            _, lr, epsilon = max(of_method, key=found.__getitem__)
            result[method] = {"lr": lr, "epsilon": epsilon}
    # The sweep's runs have no weights: there the two are the same.
    if "fixed-one" in result:
        result["fenchel-one"] = result["fixed-one"]
    return result


def main_runs(
    values: dict[str, dict[str, float]],
    tasks: Iterable[str] = TASKS,
    methods: Iterable[str] = METHODS,
    seeds: range = SEEDS,
    updates: int = UPDATES,
) -> list[Run]:
    return [
        Run(task, method, 1, "behaviour", seed, **values[method], updates=updates)
        for seed, task, method in itertools.product(seeds, tasks, methods)
    ]


def reuse_runs(
    values: dict[str, dict[str, float]],
    tasks: Iterable[str] = REUSE_TASKS,
    reuses: Iterable[int] = REUSES,
    methods: Iterable[str] = REUSE_METHODS,
    seeds: range = REUSE_SEEDS,
    updates: int = UPDATES,
) -> list[Run]:
    """As long as the main runs, which have one batch. Without weights Fenchel's λ is fixed."""
    return [
        Run(task, method, reuse, correction, seed, **values[method], updates=updates)
        for seed, task, reuse, correction, method in itertools.product(
            seeds, tasks, reuses, CORRECTIONS, methods
        )
        if correction == "weighted" or method != "fenchel-one"
    ]


def neighbour_runs(
    values: dict[str, dict[str, float]], methods: Iterable[str] = NEIGHBOUR_METHODS
) -> list[Run]:
    """Like the main runs on the sweep's tasks, but with the values of ε next to the chosen one."""
    runs = []
    for method in methods:
        index = WIDER_EPSILONS.index(values[method]["epsilon"])
        for epsilon in WIDER_EPSILONS[index - 1], WIDER_EPSILONS[index + 1]:
            changed = {method: values[method] | {"epsilon": epsilon}}
            runs += main_runs(changed, SWEEP_TASKS, [method], REUSE_SEEDS)
    return sorted(runs, key=lambda run: run.seed)


def baseline_runs(values: dict[str, dict[str, float]]) -> list[Run]:
    return [
        run
        for lr in RATES
        for run in main_runs(
            {RIVAL: values[RIVAL] | {"lr": lr}},
            BASELINE_TASKS, [RIVAL], BASELINE_SEEDS, BASELINE_UPDATES,
        )
    ]  # fmt: skip


def main() -> None:
    full, out, workers = study_options(
        __doc__.partition("\n")[0],
        "the sweep, all tasks, 5 seeds: some 5 hours on two cores",
        default="control",
    )

    def finish(name: str, runs: list[Run], path: Path) -> None:
        FILES.finish(name, runs, path, train, workers)

    if full:
        sweep = out / "sweep.csv"
        finish("sweep", sweep_runs(), sweep)
        values = chosen(FILES.read(sweep))
        parts = {
            "results": main_runs(values),
            "reuse": reuse_runs(values),
            "neighbours": neighbour_runs(values),
            "baseline": baseline_runs(values),
        }
    else:
        values = chosen(FILES.read(SWEEP))
        if not values.keys() >= set(SHORT_METHODS):
            raise SystemExit(f"{SWEEP} lacks what the sweep chooses: --full runs it")
        short = {"methods": SHORT_METHODS, "seeds": SEEDS[:1], "updates": SHORT_UPDATES}
        parts = {
            "results": main_runs(values, REUSE_TASKS[:2], **short),
            "reuse": reuse_runs(values, REUSE_TASKS[:1], (4,), **short),
        }
    for name, runs in parts.items():
        finish(name, runs, out / f"{name}.csv")


if __name__ == "__main__":
    main()
