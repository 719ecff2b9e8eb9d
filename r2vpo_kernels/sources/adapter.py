"""A head that is given as a module: its weight, its bias, and the LoRA adapters around them."""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import invalid

# What else to do with a head that is not honoured.
INSTEAD = "merge and unload an adapter first, or give r2vpo_loss the logits"


class Adapter(NamedTuple):
    """What is added to the weight: scaling · b @ a."""

    a: Tensor  # (R, H)
    b: Tensor  # (V, R)
    scaling: float


def read_head(
    weight: Tensor | nn.Module, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Adapter]]:
    """(weight, bias, adapters); a module must be no more than linear, but for LoRA around it."""
    if not isinstance(weight, nn.Module):
        return weight, bias, []
    if bias is not None:
        raise invalid("bias", bias, "None where weight is a module, which brings its own")
    adapters: list[Adapter] = []
    linear: Any = weight
    if _is_lora(weight):
        adapters, linear = _active_adapters(weight), weight.base_layer
    if not _is_plain(linear):
        around = "" if linear is weight else " within LoRA"
        raise TypeError(
            f"weight: got a {type(linear).__module__}.{type(linear).__qualname__}{around} that may "
            "compute more than torch.nn.Linear, expected a tensor (V, H), a plain torch.nn.Linear, "
            f"or peft's LoRA around one: {INSTEAD}"
        )
    return linear.weight, linear.bias, adapters


def _is_plain(module: nn.Module) -> bool:
    # An adapter has a class of its own, a patch is an attribute, and so is a weight that a hook
    # makes (weight_norm, prune).
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not any(name in module.__dict__ for name in ("forward", "weight", "bias"))
    )


def _is_lora(module: nn.Module) -> bool:
    """Whether it is peft's own layer, and no kind of it. Who has one has imported peft."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and type(module) is layers.Linear and "forward" not in vars(module)


def _active_adapters(layer: Any) -> list[Adapter]:
    """Those that its forward would add to the base layer's output."""

    def refused(what: str, instead: str = INSTEAD) -> ValueError:
        return invalid("weight", f"a LoRA head with {what}", f"plain LoRA: {instead}")

    if layer.disable_adapters and layer.merged:
        raise refused("merged adapters that are disabled", "call its unmerge() first")
    if layer.disable_adapters or layer.merged:
        return []
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        # Before peft had variants DoRA was the only one.
        if name in getattr(layer, "lora_variant", ()) or layer.use_dora[name]:
            raise refused(f"{name!r} of another kind (DoRA, aLoRA, …)")
        if not (isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0):
            raise refused(
                f"a dropout of {dropout.p} in training mode",
                "set lora_dropout=0.0, call eval() of its lora_dropout, or give r2vpo_loss the "
                "logits",
            )
        if not (_is_plain(a) and _is_plain(b)):
            raise refused(f"{name!r} of {type(a).__name__} and {type(b).__name__}")
        if b.bias is not None:
            raise refused(f"{name!r} that has a bias (lora_bias)")
        found.append(Adapter(a.weight, b.weight, float(layer.scaling[name])))
    return found


def joined(
    adapters: list[Adapter], dtype: torch.dtype, autocast: bool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """All of them as one: (lora_a (R, H), with the scaling, lora_b (V, R)).

    They multiply in their own dtype, as peft has it (float32 beside a bfloat16 base, unless it is
    told otherwise), if it is wider than `dtype`, which autocast has all products in.
    """
    if not adapters:
        return None, None
    if not autocast:
        given = [x.dtype for adapter in adapters for x in adapter[:2]]
        dtype = functools.reduce(torch.promote_types, given, dtype)
    a = [adapter.a.to(dtype) * adapter.scaling for adapter in adapters]
    b = [adapter.b.to(dtype) for adapter in adapters]
    return torch.cat(a) if len(a) > 1 else a[0], torch.cat(b, 1) if len(b) > 1 else b[0]
