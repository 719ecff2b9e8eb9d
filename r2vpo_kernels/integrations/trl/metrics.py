"""The metrics of a batch from those of its parts: micro-batches on several ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from ...output import R2VPOOutput


def gather_metrics(accelerator: Accelerator, out: R2VPOOutput, mask: Tensor) -> dict[str, float]:
    """`out.metrics()` of the micro-batch over all ranks, with one gather."""
    local = out.metrics() | {"tokens": mask.sum()}
    values: Tensor = accelerator.gather(torch.stack([x.float() for x in local.values()]))
    rows = values.view(-1, len(local)).tolist()
    return pool_metrics([dict(zip(local, row, strict=True)) for row in rows])


def pool_metrics(ranks: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of one batch from those of its parts (`R2VPOOutput.metrics`, and "tokens").

    Means are weighted by tokens. loss/* are averaged over the parts, as DDP averages gradients.
    """
    filled = [rank for rank in ranks if rank["tokens"] > 0] or ranks
    tokens = [rank["tokens"] or 1.0 for rank in filled]

    def mean(values: list[float]) -> float:
        return sum(n * x for n, x in zip(tokens, values, strict=True)) / sum(tokens)

    pooled: dict[str, float] = {}
    for name in ranks[0]:
        values = [rank[name] for rank in filled]
        if name == "ratio/min":
            pooled[name] = min(values)
        elif name == "ratio/max":
            pooled[name] = max(values)
        elif name.startswith("loss/"):
            pooled[name] = sum(rank[name] for rank in ranks) / len(ranks)
        elif name != "tokens":
            pooled[name] = mean(values)
    # The variance within the parts plus that between their means.
    center = pooled["ratio/mean"]
    pooled["ratio/var"] += mean([(rank["ratio/mean"] - center) ** 2 for rank in filled])
    both = center**2 + pooled["ratio/var"]
    pooled["ratio/ess"] = center**2 / both if both else 1.0
    return pooled
