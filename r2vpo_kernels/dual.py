"""Two ways to set variance_coef: the dual, and the closed form of its Fenchel dual."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import registry
from .batch import Batch
from .checks import (
    CENTERS,
    Center,
    check,
    check_choice,
    check_device,
    check_number,
    check_positive,
    invalid,
)
from .objective import Objective
from .output import RatioStats
from .reference import Tokens, dual_step


class VarianceConstraint:
    """Dual ascent on the constraint v ≤ target, by exponentiated gradient steps (Eq. 16):

        coef = (coef * exp(lr * min(v / target - 1, 1))).clamp(min_coef, max_coef)

    with v the ratio's second moment about one for center "one", its variance within groups for
    center "group", pooled over the groups by weight.

    Args:
        target: the ratio variance to hold, above 0 (no unit). In docs/control.md, "How much hangs
            on ε?" and "Old data", 0.04 about one and 0.01 about the group's mean did about as well
            as PPO's clip on fresh data, and 0.25 only on data up to five updates old.
        center: "one" or "group", as given to the loss.
        coef: where λ starts.
        lr: the step η_λ, at least 0: λ moves by a factor between exp(-lr) and exp(lr), whatever its
            scale, the target's, and the tail of v. The form of the step and the default are from
            docs/study.md, "Is the variance held?".
        min_coef: the lower bound of λ, above 0: from 0 no factor leads back.
        max_coef: its upper bound.
        device: where λ lives; `step` takes it to the statistics' device if that is another.

    `coef` is a 0-dim float32 tensor, changed in place: pass it as `variance_coef`. A loss keeps the
    λ it was computed with, so `step` may come before `backward`. With `device` given, nothing here
    waits for the device. What settles at the target is the mean over steps of min(v, 2·target): as
    λ falls no faster than it rises, the mean of v itself settles above it, where v varies from step
    to step. It does where a batch of rollouts serves several, with v = 0 at the first. Under a
    sampling mask a token whose set has one word counts, with ρ = 1 whatever the policy does:
    docs/sampling_masks.md has what a target for the others comes to.

    Raises:
        ValueError: an unknown center, a negative number, a target or min_coef that is not above 0,
            or bounds that cross.

    Source: docs/derivation, Eq. 16.
    """

    def __init__(
        self,
        target: float,
        *,
        center: Center = "one",
        coef: float = 0.5,
        lr: float = 0.1,
        min_coef: float = 1e-3,
        max_coef: float = 100.0,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("center", center, CENTERS)
        self.center = center
        self.target = check_positive("target", target)
        self.lr = check_number("lr", lr, 0.0)
        self.min_coef = check_positive("min_coef", min_coef)
        self.max_coef = check_number("max_coef", max_coef, self.min_coef)
        coef = check_number("coef", coef, self.min_coef, self.max_coef)
        self.coef = torch.tensor(coef, dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(self, stats: RatioStats) -> None:
        """Move λ once, from the statistics of the whole optimizer step (summed, all-reduced).

        Statistics without tokens or not finite leave λ where it is.
        """
        if self.coef.device != stats.weight.device:
            self.coef = self.coef.to(stats.weight.device)
        about_means = self.center == "group"
        settings = self.target, self.lr, self.min_coef, self.max_coef
        backend = registry.choose_backend("auto", stats.weight)
        if backend == "eager":
            self.coef.copy_(dual_step(self.coef, stats, about_means, *settings))
            return
        weight, d_sum, d_sq_sum = (
            x.contiguous() for x in (stats.weight, stats.d_sum, stats.d_sq_sum)
        )
        ops.dual_step(self.coef, weight, d_sum, d_sq_sum, about_means, *settings, backend)

    def state_dict(self) -> dict[str, Any]:
        """λ alone; the settings belong to the constructor."""
        return {"coef": self.coef.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if set(state_dict) != {"coef"}:
            raise invalid("state_dict", sorted(state_dict), "the one key 'coef'")
        # λ at a bound is its nearest float32, which may lie outside.
        bounds = torch.tensor([self.min_coef, self.max_coef], dtype=torch.float32).tolist()
        check_number("coef", float(state_dict["coef"]), *bounds)
        with torch.no_grad():
            self.coef.copy_(state_dict["coef"])


@torch.no_grad()
def fenchel_coef(
    advantages: Tensor,
    target: float,
    *,
    weight: Tensor | None = None,
    center: Center = "one",
    group_ids: Tensor | None = None,
    num_groups: int | None = None,
) -> Tensor:
    """λ* of the χ² ball's Fenchel dual, in closed form (Eq. 18):

        λ* = rms_w(advantages) / (2·√target)          center "one"
        λ* = std_w(advantages in groups) / (2·√target) center "group"

    In torch: `(weight * advantages**2).sum().div(weight.sum()).sqrt() / (2 * target**0.5)`.

    Args:
        advantages: any shape, s·A: already times the importance weights if there are any.
        target: the radius v of E[(ρ - c)²] ≤ v, above 0.
        weight: like advantages, at least 0; 0 where masked (whatever stands in advantages there).
        center: "one", or "group" for the deviation from the weighted mean of each group.
        group_ids: the group of each entry, like advantages; read by center "group" alone. Without
            them all entries are one group.
        num_groups: how many groups group_ids name.

    Returns:
        A 0-dim tensor, float32 (float64 for float64 advantages); 0 if nothing has weight.

    Raises:
        ValueError: naming the argument.
        TypeError: the same, for a wrong type.

    Source: docs/derivation, Eq. 17 and 18.
    """
    check_choice("center", center, CENTERS)
    target = check_positive("target", target)
    if not isinstance(advantages, Tensor) or advantages.is_complex():
        raise TypeError("advantages: expected a tensor of real numbers")
    for name, value in (("weight", weight), ("group_ids", group_ids)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != advantages.shape:
            expected = f"a tensor of shape {tuple(advantages.shape)}, that of advantages"
            raise invalid(name, value, expected)
        check_device(name, value, advantages.device)
    w = torch.ones_like(advantages) if weight is None else weight
    batch = Batch.build(
        torch.Size([advantages.numel()]),
        advantages.device,
        mask=w.reshape(-1),
        group_ids=None if group_ids is None else group_ids.reshape(-1),
        num_groups=num_groups,
    )
    tokens = Tokens.of(batch, Objective(advantages=advantages.reshape(-1)), advantages)
    x = tokens.advantages
    w = tokens.token_weight * torch.where(tokens.valid, w.reshape(-1).to(x.dtype), 0.0)
    w = check(w, w >= 0, w, "weight", "at least 0")
    if center == "group":
        x = x - tokens.groups.spread(tokens.groups.mean(x, w))
    total = w.sum()
    mean_square: Tensor = (w * x**2).sum() / torch.where(total == 0, 1.0, total)
    return mean_square.sqrt() / (2.0 * math.sqrt(target))
