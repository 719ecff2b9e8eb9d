"""DTensors: an entry computes with this rank's part of them, and answers with plain tensors.

Where tokens are sharded each rank has the loss of its own tokens, as with data parallelism. Where
the vocabulary is, the ranks of that dimension of the mesh are the `tp_group`.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import invalid
from .shard import exchange_shard_layout

# Arguments whose DTensors have a way of their own (`gathered`), and those that are not by token.
_HEAD = ("weight", "bias")
_NOT_BY_TOKEN = ("center", "cu_seqlens", "normalizer")


def is_dtensor(*values: object) -> bool:
    """Whether one is. A torch without torch.distributed has no DTensor to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in map(type, values)


def gathered(x: Any, dtype: torch.dtype) -> Tensor:
    """A sharded parameter (FSDP2) as a whole, in the dtype that FSDP2's mixed precision would have.

    Its gradient is reduced to the ranks' mean. That is what FSDP2 makes of every other gradient,
    and what ranks that computed the same (tensor parallelism) must make of theirs.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    return x.to(dtype).full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def local_arguments(
    names: tuple[str, ...], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """An entry's arguments with this rank's part of each DTensor.

    The first of `names` says where tokens and vocabulary are. Its gradient is placed as it is.
    """
    given = dict(zip(names, arguments, strict=False)) | keywords
    source, like, group = names[0], given.get(names[0]), given.get("tp_group")

    def local(name: str, x: Any) -> Any:
        if name in _HEAD:
            _check_head(name, x, like)
            return x
        if not is_dtensor(x):
            return x
        if name != source:
            _check_placements(name, x, source, like)
        return x.to_local(grad_placements=x.placements)

    try:
        if is_dtensor(like):
            group = _vocabulary_group(source, like, group)
        arguments_here = [local(name, x) for name, x in zip(names, arguments, strict=False)]
        keywords_here = {name: local(name, x) for name, x in keywords.items()}
    except ValueError as error:
        if isinstance(group, dist.ProcessGroup):

            def ask(error: ValueError = error) -> NoReturn:
                raise error

            exchange_shard_layout(group, ask, False)  # where the other ranks wait
        raise
    if group is not None:
        keywords_here["tp_group"] = group
    if is_dtensor(like) and "inplace" in keywords:
        # Autograd would not notice that what a DTensor holds was overwritten.
        keywords_here["inplace"] = False
    return arguments_here, keywords_here


def _vocabulary_group(source: str, x: Any, tp_group: Any) -> Any:
    """The ranks that share out the vocabulary: `tp_group`, or a dimension of the mesh of x."""
    from torch.distributed.tensor import Shard

    mesh, placements = x.device_mesh, x.placements
    dims = [None if p.is_replicate() else p.dim if type(p) is Shard else -1 for p in placements]
    sharded = [at for at, dim in enumerate(dims) if dim not in (None, *_token_dims(source, x))]
    if sharded and (source != "logits" or [dims[at] for at in sharded] != [x.ndim - 1]):
        expected = "Replicate and Shard of tokens"
        if source == "logits":
            expected += ", and Shard of the vocabulary over at most one dimension of the mesh"
        raise invalid(source, f"a DTensor placed {placements}", expected)
    if sharded:
        group, ranks = mesh.get_group(sharded[0]), _ranks_along(sharded[0], mesh)
        if dist.get_process_group_ranks(group) != ranks:
            raise invalid(source, f"a vocabulary sharded over ranks {ranks}", "ascending ranks")
        if tp_group is None:
            return group
    if isinstance(tp_group, dist.ProcessGroup):
        theirs = dist.get_process_group_ranks(tp_group)
        if sharded:
            fits = theirs == ranks
        else:
            # Along these a rank has all words, or other tokens.
            apart = [at for at, dim in enumerate(dims) if source == "logits" or dim is not None]
            fits = all(len({*theirs} & {*_ranks_along(at, mesh)}) == 1 for at in apart)
        if not fits:
            expected = f"ranks that share out the vocabulary of {source}, a DTensor"
            raise invalid(
                "tp_group", f"ranks {theirs}", f"{expected} placed {placements} on {mesh}"
            )
    return tp_group


def _token_dims(source: str, x: Any) -> range:
    return range(x.ndim if source == "logps" else x.ndim - 1)


@torch.compiler.assume_constant_result
def _ranks_along(dim: int, mesh: Any) -> list[int]:
    """Those that differ from this one in one dimension of the mesh."""
    here = list(mesh.get_coordinate())
    here[dim] = slice(None)
    ranks: list[int] = mesh.mesh[tuple(here)].tolist()
    return ranks


def _check_head(name: str, x: Any, hidden: Any) -> None:
    """What `gathered` does with its gradient is wrong where ranks have tokens of their own."""
    given = x.parameters() if isinstance(x, torch.nn.Module) else [x]
    if is_dtensor(*given) and is_dtensor(hidden) and any(p.is_shard() for p in hidden.placements):
        expected = "a plain tensor (full_tensor()) where hidden is a DTensor of sharded tokens"
        raise invalid(name, "a DTensor", f"{expected}, or hidden.to_local()")


def _check_placements(name: str, x: Any, source: str, like: Any) -> None:
    """Per token and per sequence a shard as `like` has it, else whole."""
    from torch.distributed.tensor import Replicate

    if not is_dtensor(like):
        raise invalid(name, "a DTensor", f"a plain tensor (to_local()), as {source} is one")
    dims = () if name in _NOT_BY_TOKEN else _token_dims(source, like)[: x.ndim]
    placements = tuple(
        p if p.is_shard() and p.dim in dims else Replicate() for p in like.placements
    )
    if (x.placements, x.device_mesh) != (placements, like.device_mesh):
        raise invalid(
            name,
            f"a DTensor placed {x.placements} on {x.device_mesh}",
            f"{placements} on {like.device_mesh}, where {source} is, or its local part",
        )
