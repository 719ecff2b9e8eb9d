"""The Triton backend: row kernels over logits, and kernels over what is per token."""

from .dual import dual_step
from .head import head_dhidden, head_dweight, head_logits
from .launch import INTERPRETED as SIMULATED
from .prepare import prepare
from .rows import logps_backward, logps_forward, one_pass, scale
from .shards import shard_combine, shard_parts
from .tokens import finish, means

__all__ = [
    "SIMULATED", "dual_step", "finish", "head_dhidden", "head_dweight", "head_logits",
    "logps_backward", "logps_forward", "means", "one_pass", "prepare", "scale", "shard_combine",
    "shard_parts",
]  # fmt: skip
