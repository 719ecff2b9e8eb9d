"""What happens once per optimizer step: its statistics are complete, and λ moves.

Trainers call a loss per micro-batch and do not say where an optimizer step ends. Torch does, to
every hook registered for all optimizers.
"""

from __future__ import annotations

import json
import uuid
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import RatioStats, VarianceConstraint
from ..checks import Center, check_number, check_positive, invalid

# So many steps with every ratio at one are no coincidence: a learning rate that warms up from 0
# explains the first, and the first mini-batch of a rollout another.
STEPS_WATCHED = 4


def all_ranks() -> None:
    """The group of all ranks, by torch's name for it."""


def variance_constraint(
    *,
    variance_target: float | None,
    variance_coef: float | None,
    variance_coef_lr: float = 0.1,
    variance_coef_min: float = 1e-3,
    variance_coef_max: float = 100.0,
    variance_coef_file: str | None = None,
    center: Center = "one",
    device: torch.device | None = None,
    prefix: str = "",
) -> VarianceConstraint | None:
    """The dual by the names that a trainer's options have; errors name them, after `prefix`.

    None without a target, where no other option of the dual may be set.
    """
    if variance_target is None:
        for name, value, default in (
            ("variance_coef_lr", variance_coef_lr, 0.1),
            ("variance_coef_min", variance_coef_min, 1e-3),
            ("variance_coef_max", variance_coef_max, 100.0),
            ("variance_coef_file", variance_coef_file, None),
        ):
            if value != default:
                expected = f"{default!r}: without variance_target nothing reads it"
                raise invalid(prefix + name, repr(value), expected)
        return None
    target = check_positive(prefix + "variance_target", variance_target)
    lr = check_number(prefix + "variance_coef_lr", variance_coef_lr, 0.0)
    low = check_positive(prefix + "variance_coef_min", variance_coef_min)
    high = check_number(prefix + "variance_coef_max", variance_coef_max, low)
    start = 0.5 if variance_coef is None else variance_coef
    start = check_number(prefix + "variance_coef", start, low, high)
    return VarianceConstraint(
        target, center=center, coef=start, lr=lr, min_coef=low, max_coef=high, device=device
    )


class OptimizerSteps:
    """The statistics of a policy's optimizer steps, and the dual that follows them.

    follow() adds what one loss call measured. The next step of an optimizer ends the window: its
    statistics are summed over the ranks of `group`, and the dual moves λ once, by all of them.
    Steps without a loss call before them, such as those of a critic or of the second of a policy's
    two optimizers, are ignored. What a step measured that is skipped for its gradients counts with
    the next: the weights are still the same.

    Args:
        constraint: the dual, or None where λ is a number.
        advice: how to give the penalty an effect, in the trainer's own words: a warning names it
            once if all ratios of the first STEPS_WATCHED steps are exactly 1.
        group: returns the ranks that call the loss, and take part in every optimizer step;
            default: all ranks. None, and statistics are those of this rank, where a rank may have
            no token in a step: the others would wait for it.
        file: where λ is taken from if it exists, and written by the group's first rank after each
            step, which waits for the device: for trainers whose checkpoints cannot hold it. It may
            be set to another between steps.
    """

    def __init__(
        self,
        constraint: VarianceConstraint | None = None,
        *,
        advice: str | None = None,
        group: Callable[[], dist.ProcessGroup | None] | None = all_ranks,
        file: Path | None = None,
    ) -> None:
        self.constraint = constraint
        self.last: RatioStats | None = None
        self._advice = advice
        self._group = group
        self.file = file
        self._window: dict[int, RatioStats] = {}
        self._skipped: dict[int, RatioStats] = {}  # by a step of which the host does not know
        self._watched = 0
        self._moved: Tensor | float = 0.0
        if constraint is not None and file is not None and file.exists():
            self.restore(file)
        # The hook lives as long as torch does, this object as long as its trainer.
        this = weakref.ref(self)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            steps = this()
            if steps is not None:
                # GradScaler leaves it to a fused optimizer whether to skip, and does not wait.
                steps.close(getattr(optimizer, "found_inf", None))

        hook = register_optimizer_step_post_hook(after_step)
        weakref.finalize(self, hook.remove)

    def follow(self, stats: RatioStats, batch: int = 0) -> None:
        """Add a micro-batch. Those of one `batch` share their groups."""
        if self.last is None:
            self.last = _of_no_token(stats)
        known = self._window.get(batch)
        self._window[batch] = stats if known is None else known + stats

    def follow_backward(self, loss: Tensor, stats: RatioStats) -> None:
        """Add a micro-batch once `loss`, 0-dim, goes backward, unless its gradient is 0.

        For trainers that repeat micro-batches, and multiply their losses by 0, so that all ranks
        have as many.
        """
        if loss.requires_grad:
            self.follow(_of_no_token(stats))
            loss.register_hook(lambda gradient: self.follow(_where(gradient != 0, stats)))

    @torch.no_grad()
    def close(self, skipped: Tensor | None = None) -> None:
        """End an optimizer step: by torch's hook, or by a driver whose workers have the optimizers.

        Where `skipped`, on the device, is not 0, its statistics count with the next.
        """
        if not self._window:
            return
        window, self._window = self._window, {}
        for batch, stats in self._skipped.items():
            window[batch] = window[batch] + stats if batch in window else stats
        self._skipped = {}
        if skipped is not None:
            kept = skipped.reshape(()) != 0
            self._skipped = {batch: _where(kept, stats) for batch, stats in window.items()}
            window = {batch: _where(~kept, stats) for batch, stats in window.items()}
        stats, rank = _concatenate(window), 0
        if dist.is_initialized() and self._group is not None:
            group = self._group()
            stats, rank = stats.all_reduce(group), dist.get_rank(group)
        if skipped is None or self.last is None or self.last.weight.shape != stats.weight.shape:
            self.last = stats
        else:
            self.last = _where(skipped.reshape(()) == 0, stats, self.last)
        if self.constraint is not None:
            self.constraint.step(stats)
            if self.file is not None and rank == 0:
                self.save(self.file)
        if self._advice is not None and self._watched < STEPS_WATCHED:
            self._watch(stats, self._advice)

    def _watch(self, stats: RatioStats, advice: str) -> None:
        self._watched += 1
        self._moved = self._moved + stats.d_sq_sum.sum()
        if self._watched == STEPS_WATCHED and float(self._moved) == 0:
            warnings.warn(
                f"in the first {STEPS_WATCHED} optimizer steps every importance ratio was exactly "
                f"1: the variance penalty is 0, and variance_coef has no effect. {advice}",
                stacklevel=2,
            )

    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors: λ, and the ratio's statistics over the last complete optimizer step."""
        result = {} if self.constraint is None else {"variance_coef": self.constraint.coef.clone()}
        if self.last is None:
            return result
        sums = (self.last.weight, self.last.d_sum, self.last.d_sq_sum)
        pooled = RatioStats(*(x.sum() for x in sums))
        return result | {
            "step/ratio_mean": pooled.mean,
            "step/ratio_var": pooled.variance,
            "step/ratio_ess": pooled.ess,
        }

    def save(self, file: Path) -> None:
        """Write λ; one rank calls it. Readers find the file whole."""
        assert self.constraint is not None
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
        partial.write_text(json.dumps({"variance_coef": self.constraint.coef.item()}))
        partial.replace(file)

    def restore(self, file: Path) -> None:
        """Read λ; a file that does not exist leaves it where it starts, with a warning."""
        assert self.constraint is not None
        if file.exists():
            coef = json.loads(file.read_text())["variance_coef"]
            self.constraint.load_state_dict({"coef": torch.tensor(coef)})
        else:
            start = self.constraint.coef.item()
            warnings.warn(f"{file} does not exist: λ starts anew at {start:g}", stacklevel=2)


def _where(condition: Tensor, stats: RatioStats, other: RatioStats | None = None) -> RatioStats:
    """The statistics, else the other's, or those of no token."""
    other = _of_no_token(stats) if other is None else other
    return RatioStats(
        torch.where(condition, stats.weight, other.weight),
        torch.where(condition, stats.d_sum, other.d_sum),
        torch.where(condition, stats.d_sq_sum, other.d_sq_sum),
    )


def _of_no_token(stats: RatioStats) -> RatioStats:
    return RatioStats(*map(torch.zeros_like, (stats.weight, stats.d_sum, stats.d_sq_sum)))


def _concatenate(batches: dict[int, RatioStats]) -> RatioStats:
    """The statistics of batches whose groups are all different."""
    parts = batches.values()
    return RatioStats(
        torch.cat([part.weight for part in parts]),
        torch.cat([part.d_sum for part in parts]),
        torch.cat([part.d_sq_sum for part in parts]),
    )
