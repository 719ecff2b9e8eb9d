"""Registered ops: one schema, one argument check, one fake each; eager mode calls them directly.

They are opaque to torch.compile and carry no autograd of their own: the autograd Functions in
sources/ do. Here are those over logits and over log-probs; sources/ registers its own likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends import registry
from .backends.calls import (
    FAULTS,
    NOTHING,
    NUMBERS,
    Column,
    Prepare,
    Support,
    Tokens,
    parts_of,
    units_in,
    units_of,
    workspace_size,
)
from .backends.calls import column as column_of
from .batch import Batch
from .checks import (
    KL_ESTIMATORS,
    MISSING_LABELS,
    NAMESPACE,
    POLICY_LOSSES,
    check_choice,
    check_device,
    check_float,
    invalid,
    may_synchronise,
)
from .objective import Objective, checked_temperature
from .output import METRICS
from .sampling import SamplingMask

VECTOR_BYTES = 16
# What labels are not checked against before the shards of a vocabulary meet.
UNKNOWN_VOCABULARY = 2**62

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str, schema: str, *, fake: Callable[..., Any], check: Callable[..., None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an op, and return what calls it.

    In eager mode that is the function itself: the entries have checked its arguments. Whoever calls
    torch.ops has not, and there `check` comes first.
    """

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def checked(*arguments: Any) -> Any:
            for argument, value in zip(overload._schema.arguments, arguments, strict=True):
                if isinstance(value, Tensor):
                    check_memory(argument.name, value)
            check(*arguments)
            return implementation(*arguments)

        definition = name + " ".join(schema.split())
        mutates = "(a!)" in schema
        _LIBRARY.define(definition, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or not _are_plain(arguments):
                return overload(*_flat(arguments))
            if mutates:
                # As the dispatcher does, so that autograd notices.
                torch.autograd.graph.increment_version(arguments[0])
            return implementation(*arguments)

        return call

    return decorate


def _flat(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """As the dispatcher takes them."""
    *others, last = arguments
    return (*others, *last.flat(others[0])) if isinstance(last, Call) else arguments


def _are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether kernels may read the tensors as they lie, and nobody else would see an op on them.

    A subclass may have no memory of its own, and a negated view's values are not those in memory.
    """
    if torch._C._len_torch_dispatch_stack():
        return False
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.is_neg():
                return False
        elif kind is Call:
            if not _are_plain(value.tensors()):
                return False
        elif value is not None and isinstance(value, Tensor):
            return False
    return True


def check_memory(name: str, value: Tensor) -> None:
    """Memory may have been given back under a tensor that lives on."""
    if value.numel() == 0:
        return
    last = value.numel() - 1
    if not value.is_contiguous():
        last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    reached = (value.storage_offset() + last + 1) * value.element_size()
    if value.untyped_storage().nbytes() < reached:
        held = f"{value.untyped_storage().nbytes()} bytes of storage"
        raise ValueError(f"{name}: got {held}, expected {reached} for its shape")


# What was asked, as the dispatcher takes it: flat. `numbers` are variance_coef, temperature, the
# denominator's factor, kl_coef, entropy_coef, log_ratio_clamp, clip_low, clip_high and dual_clip,
# where they are numbers; under torch.compile they are a tensor, so that no compilation depends on a
# value.
CALL = """SymInt[] shape, Tensor? labels, Tensor? mask, SymInt ignore_index, Tensor? cu_seqlens,
    Tensor? token_ids, Tensor? offsets, Tensor? largest, str missing_label,
    Tensor? group_ids, SymInt num_groups, SymInt group_size, str reduction, Tensor? normalizer,
    bool normalized, Tensor? advantages, Tensor? old_logps, str policy_loss, Tensor? variance_coef,
    Tensor? center, bool empirical_center, str ratio_level, Tensor? importance_weights,
    Tensor? ref_logps, str kl_estimator, bool kl_unbiased, Tensor? temperature, float[] numbers,
    Tensor? number_vector, bool with_entropy, str backend"""


@dataclass(slots=True)
class Call:
    """What was asked, on its way through an op."""

    batch: Batch
    objective: Objective
    with_entropy: bool
    backend: str
    number_vector: Tensor | None = None

    def tensors(self) -> tuple[Any, ...]:
        """What may be one, or a number or a name."""
        batch, objective = self.batch, self.objective
        given = () if batch.sampling_mask is None else batch.sampling_mask.tensors()
        return (
            *given,
            batch.labels, batch.mask, batch.cu_seqlens, batch.group_ids, batch.normalizer,
            objective.advantages, objective.old_logps, objective.variance_coef, objective.center,
            objective.importance_weights, objective.ref_logps, objective.temperature,
        )  # fmt: skip

    @property
    def per_token(self) -> bool:
        return self.batch.reduction == "none"

    @property
    def token_ids(self) -> Tensor | None:
        """Those of the sampling mask."""
        mask = self.batch.sampling_mask
        return None if mask is None else mask.token_ids

    @property
    def offsets(self) -> Tensor | None:
        mask = self.batch.sampling_mask
        return None if mask is None else mask.offsets

    def numbers(self) -> list[float]:
        batch, objective = self.batch, self.objective
        coef, temperature, factor = objective.variance_coef, objective.temperature, batch.normalizer
        if factor is None:
            factor = batch.shape[1] if batch.reduction == "seq-mean-token-sum-norm" else 1.0
        return [
            0.0 if isinstance(coef, Tensor) else coef,
            1.0 if isinstance(temperature, Tensor) else temperature,
            1.0 if isinstance(factor, Tensor) else factor,
            objective.kl_coef,
            objective.entropy_coef,
            objective.log_ratio_clamp,
            objective.clip_low,
            objective.clip_high,
            objective.dual_clip,
        ]

    def flat(self, like: Tensor) -> tuple[Any, ...]:
        """In the order of CALL."""
        batch, objective, sets = self.batch, self.objective, self.batch.sampling_mask
        numbers, vector = self.numbers(), None
        if torch.compiler.is_compiling():
            zero = like.new_zeros((), dtype=torch.float32)
            vector = torch.stack([zero + number for number in numbers])
            numbers = []
        return (
            batch.shape, batch.labels, _constant(batch.mask), batch.ignore_index, batch.cu_seqlens,
            *((None,) * 3 if sets is None else sets.tensors()),
            "error" if sets is None else sets.missing_label,
            batch.group_ids, batch.num_groups, batch.group_size, batch.reduction,
            _constant(batch.normalizer), batch.normalizer is not None,
            _constant(objective.advantages), _constant(objective.old_logps),
            objective.policy_loss, _constant(objective.variance_coef), _constant(objective.center),
            objective.empirical_center, objective.ratio_level,
            _constant(objective.importance_weights), _constant(objective.ref_logps),
            objective.kl_estimator, objective.kl_unbiased, _constant(objective.temperature),
            numbers, vector, self.with_entropy, self.backend,
        )  # fmt: skip

    def arguments(self, like: Tensor) -> tuple[Any, ...]:
        """What an autograd Function and an op take: itself, but flat under torch.compile."""
        return self.flat(like) if torch.compiler.is_compiling() else (self,)

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> Call:
        if len(arguments) == 1:
            call: Call = arguments[0]
            return call
        (
            shape, labels, mask, ignore_index, cu_seqlens, token_ids, offsets, largest,
            missing_label, group_ids, num_groups, group_size, reduction, normalizer, normalized,
            advantages, old_logps, policy_loss, variance_coef, center, empirical_center,
            ratio_level, importance_weights, ref_logps, kl_estimator, kl_unbiased, temperature,
            numbers, number_vector, with_entropy, backend,
        ) = arguments  # fmt: skip
        if number_vector is not None:
            numbers = [1.0] * (NUMBERS - 1) + [math.inf]  # not read
        if normalized and normalizer is None:
            normalizer = numbers[2]
        sampling_mask = None
        if token_ids is not None:
            sampling_mask = SamplingMask.of(token_ids, offsets, largest, missing_label)
        batch = Batch(
            torch.Size(shape), labels, mask, ignore_index, cu_seqlens, group_ids, num_groups,
            group_size, reduction, normalizer, sampling_mask,
        )  # fmt: skip
        objective = Objective(
            advantages=advantages,
            old_logps=old_logps,
            policy_loss=policy_loss,
            variance_coef=numbers[0] if variance_coef is None else variance_coef,
            center=("group" if empirical_center else "one") if center is None else center,
            ratio_level=ratio_level,
            importance_weights=importance_weights,
            ref_logps=ref_logps,
            kl_coef=numbers[3],
            kl_estimator=kl_estimator,
            kl_unbiased=kl_unbiased,
            entropy_coef=numbers[4],
            temperature=numbers[1] if temperature is None else temperature,
            log_ratio_clamp=numbers[5],
            clip_low=numbers[6],
            clip_high=numbers[7],
            dual_clip=numbers[8],
        )
        return Call(batch, objective, with_entropy, backend, number_vector)

    def check(self, device: torch.device) -> None:
        """As the entries check their arguments."""
        batch, objective = self.batch, self.objective
        if self.number_vector is not None:
            check_is("number_vector", self.number_vector, torch.float32, device, (NUMBERS,))
        if batch.sampling_mask is not None:
            self._check_sampling_mask(batch.sampling_mask, device)
        Batch.build(
            batch.shape,
            device,
            labels=batch.labels,
            mask=batch.mask,
            ignore_index=batch.ignore_index,
            cu_seqlens=batch.cu_seqlens,
            group_ids=batch.group_ids,
            num_groups=None if batch.group_ids is None else batch.num_groups,
            group_size=batch.group_size or None,
            reduction=batch.reduction,
            normalizer=batch.normalizer,
            sampling_mask=batch.sampling_mask,
        )
        if objective.advantages is None:
            checked_temperature(batch, objective.temperature, device)
            return
        clip_range = None
        if objective.policy_loss != "ratio":
            clip_range = objective.clip_low, objective.clip_high
        Objective.build(
            batch,
            device,
            old_logps=objective.old_logps,
            advantages=objective.advantages,
            policy_loss=objective.policy_loss,
            clip_range=clip_range,
            dual_clip=None if math.isinf(objective.dual_clip) else objective.dual_clip,
            variance_coef=objective.variance_coef,
            center=objective.center,
            ratio_level=objective.ratio_level,
            importance_weights=objective.importance_weights,
            ref_logps=objective.ref_logps,
            kl_coef=objective.kl_coef if objective.ref_logps is not None else 0.0,
            kl_estimator=objective.kl_estimator,
            kl_unbiased=objective.kl_unbiased,
            entropy_coef=objective.entropy_coef,
            log_ratio_clamp=objective.log_ratio_clamp,
            temperature=objective.temperature,
        )

    def _check_sampling_mask(self, mask: SamplingMask, device: torch.device) -> None:
        """Kernels take for granted what it does with what it is given."""
        check_choice("missing_label", mask.missing_label, MISSING_LABELS)
        check_is("token_ids", mask.token_ids, torch.int32, device, (mask.token_ids.numel(),))
        check_is("offsets", mask.offsets, torch.int64, device, (self.batch.tokens + 1,))
        check_is("largest", mask.largest, torch.int64, device, ())
        if not may_synchronise(mask.offsets):
            return
        ids, offsets, count = mask.token_ids, mask.offsets, mask.token_ids.shape[0]
        if not ((offsets[0] == 0) & (offsets[-1] == count) & (offsets.diff() >= 0).all()):
            raise invalid("offsets", offsets.tolist(), f"numbers that rise from 0 to {count}")
        rises = (ids.diff() > 0) | (mask.token_of().diff() > 0)
        if not ((ids >= 0).all() & rises.all()):
            raise invalid("token_ids", ids, "ids of at least 0 that rise within each set")
        if (ids > mask.largest).any():
            raise invalid("largest", mask.largest.item(), "an id of which none is larger")


def _constant(value: Any) -> Tensor | None:
    """A tensor, through which no gradient goes; None for a number."""
    if not isinstance(value, Tensor):
        return None
    return value.detach() if value.requires_grad else value


def check_is(
    name: str, value: Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]
) -> None:
    came = (value.dtype, value.device, tuple(value.shape), value.is_contiguous())
    if came != (dtype, device, shape, True):
        got = f"a {'' if came[3] else 'strided '}{value.dtype} tensor of shape {came[2]}"
        expected = f"a {dtype} tensor of shape {shape} on {device}"
        raise ValueError(f"{name}: got {got} on {value.device}, expected {expected}")


def check_logits(name: str, logits: Tensor, backend: str) -> None:
    """What the row kernels take for granted."""
    whole = logits.dim() == 3 and logits.shape[2] > 0
    if not (whole and (logits.shape[2] == 1 or logits.stride(2) == 1)):
        got = f"shape {tuple(logits.shape)}, strides {logits.stride()}"
        raise ValueError(f"{name}: got {got}, expected (B, T, V) with a contiguous vocabulary")
    if logits.shape[2] >= 2**31:
        raise ValueError(f"{name}: got a vocabulary of {logits.shape[2]}, expected less than 2^31")
    check_backend(backend, logits)
    check_alignment(name, logits, backend)


def check_alignment(name: str, logits: Tensor, backend: str) -> None:
    if backend != "cpp" and logits.untyped_storage().data_ptr() % VECTOR_BYTES:
        # `empty_gradient` would not lie like it.
        raise ValueError(
            f"{name}: got memory that does not begin at a 16-byte boundary, expected memory that "
            "does: clone them"
        )


def check_backend(backend: str, tensor: Tensor) -> None:
    if backend not in registry.TABLE or registry.why_not(backend, tensor):
        expected = f"one of {', '.join(registry.TABLE)} that takes them"
        raise ValueError(f"backend: got {backend!r} for {tensor.dtype} input, expected {expected}")


def _check_rows(logits: Tensor, call: Call) -> None:
    check_logits("logits", logits, call.backend)
    shape, rows = tuple(call.batch.shape), tuple(logits.shape[:2])
    if shape != rows and not (rows[0] == 1 and shape == rows[1:]):
        raise invalid("shape", shape, f"that of logits less V, {rows}")
    if call.batch.labels is None or call.batch.labels.shape != call.batch.shape:
        raise invalid("labels", call.batch.labels, f"integers of shape {shape}")
    call.check(logits.device)


def _check_overwritten(name: str, logits: Tensor) -> None:
    if rows_overlap(logits):
        expected = "rows of their own, for they are overwritten"
        raise ValueError(f"{name}: got rows that share memory, expected {expected}")


def rows_overlap(logits: Tensor) -> bool:
    """Whether rows (B, T) or (N,) share memory."""
    # Each must begin past the end of the one before, in one order or the other.
    rows = zip(logits.shape[:-1], logits.stride()[:-1], strict=True)
    end = logits.shape[-1]
    for n, step in sorted(rows, key=lambda row: row[1]):
        if n > 1 and step < end:
            return True
        end += (n - 1) * step
    return False


def empty_gradient(logits: Tensor) -> Tensor:
    """An empty tensor like logits, with each row at the same place within 16 bytes.

    The kernels read and write in whole 16-byte words, which only rows that lie alike allow. For
    contiguous logits this is an ordinary contiguous tensor.
    """
    if logits.is_contiguous() and logits.storage_offset() == 0:
        return torch.empty_like(logits)
    vector = VECTOR_BYTES // logits.element_size()
    batch, length, vocabulary = logits.shape
    token = vocabulary + (logits.stride(1) - vocabulary) % vector if length > 1 else vocabulary
    row = length * token
    row = row + (logits.stride(0) - row) % vector if batch > 1 else row
    start = logits.storage_offset() % vector
    if logits.numel() == 0:
        return logits.new_empty(logits.shape)
    size = start + (batch - 1) * row + (length - 1) * token + vocabulary
    return logits.new_empty(size).as_strided(logits.shape, (row, token, 1), start)


# What kernels do, in the order in which the ops below call them.


def prepare(kernels: Any, call: Call, arguments: Prepare) -> Tokens:
    """Run `prepare`; where the host may look, a bad value raises."""
    kernels.prepare(arguments)
    tokens = arguments.tokens
    if may_synchronise(tokens.workspace):
        faults = tokens.workspace[FAULTS : FAULTS + tokens.parts].tolist()
        if any(faults):
            _raise_for_a_bad_value(call, tokens.workspace, arguments)
    mask = arguments.sampling_mask
    if mask is not None:
        tokens.support = support_of(mask.token_ids, arguments.first_word)
    return tokens


def _raise_for_a_bad_value(call: Call, like: Tensor, arguments: Prepare) -> None:
    """The reference says what was wrong."""
    batch, objective = call.batch, call.objective
    if call.number_vector is not None:
        flat = list(Call(batch, objective, False, "").flat(like))
        flat[-4:-2] = call.number_vector.tolist(), None
        call = Call.of(tuple(flat))
    vocabulary, whole = arguments.vocabulary, arguments.sampling_vocabulary
    reference.Tokens.of(call.batch, call.objective, like, vocabulary, whole)
    raise AssertionError("a kernel met a bad value that the reference accepts")


def empty_entropy(logps: Tensor, with_entropy: bool) -> Tensor:
    """Empty where it is not wanted."""
    return torch.empty_like(logps) if with_entropy else logps.new_empty(0)


def empty_results(logps: Tensor, groups: int, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats, metrics), to be written by `finish`."""
    loss = torch.empty_like(logps) if per_token else logps.new_empty(())
    return loss, logps.new_empty(3, groups), logps.new_empty(len(METRICS))


def finish_tokens(
    kernels: Any,
    tokens: Tokens,
    logps: Tensor,
    entropy: Tensor | None,
    empirical_center: bool,
    per_token: bool,
    slopes: Tensor | None = None,
    upstream: Column = NOTHING,
    logps_out: Tensor | None = None,
    entropy_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats, metrics); in `slopes`, if given, dL/dlogp and, with entropy, dL/dH.

    In logps_out and entropy_out, if given, copies.
    """
    means = None
    if empirical_center:
        means = logps.new_empty(2, tokens.groups)
        kernels.means(tokens, logps, upstream, means)
    loss, stats, metrics = empty_results(logps, tokens.groups, per_token)
    flat_loss = loss.view(-1) if per_token else loss
    dlogps = dentropy = None
    if slopes is not None:
        dlogps, *others = slopes.unbind()
        dentropy = others[0] if others else None
    kernels.finish(
        tokens, logps, entropy, upstream, means, flat_loss, stats, metrics, dlogps, dentropy,
        logps_out, entropy_out,
    )  # fmt: skip
    return loss, stats, metrics


# The ops. What is per token has the shape of labels. `entropy` is empty where it is not wanted. A
# name that ends in _ writes the gradient over the logits.


def _outputs(like: Tensor, shape: Any, with_entropy: bool) -> tuple[Tensor, Tensor]:
    logps = like.new_empty(shape, dtype=torch.float32)
    return logps, empty_entropy(logps, with_entropy)


def _check_forward(logits: Tensor, layout: Tensor | None, *flat: Any) -> None:
    _check_rows(logits, Call.of(flat))
    check_layout(layout)


def check_layout(layout: Tensor | None) -> None:
    if layout is None:
        return
    on_host = layout.device.type == "cpu" and layout.dtype == torch.int64
    if not (on_host and layout.dim() == 1 and layout.shape[0] >= 3):
        raise invalid("layout", layout, "what shard_layout returned: int64 on the CPU")


def arguments_of(call: Call, device: torch.device, words: int, layout: Tensor | None) -> Prepare:
    """What `prepare` takes, for logits of `words` words: all, or those of a shard."""
    numbers = tuple(call.numbers()) if call.number_vector is None else call.number_vector
    arguments = Prepare.of(call.batch, call.objective, numbers, device, call.backend)
    arguments.vocabulary = arguments.words = arguments.sampling_vocabulary = words
    if layout is not None:
        # Labels are checked where the shards meet.
        arguments.first_word, arguments.vocabulary = int(layout[0]), UNKNOWN_VOCABULARY
        arguments.sampling_vocabulary = int(layout[1])
    return arguments


def support_of(token_ids: Tensor, first_word: int) -> Support:
    """What the row kernels take of a sampling mask, over logits from `first_word` on."""
    return Support(token_ids, token_ids.new_empty(token_ids.shape, dtype=torch.float32), first_word)


def fake_forward(like: Tensor, flat: tuple[Any, ...]) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    batch = call.batch
    logps, entropy = _outputs(like, batch.shape, call.with_entropy)
    workspace = logps.new_empty(workspace_size(batch.tokens, units_of(batch)[0]))
    return workspace, logps, torch.empty_like(logps), torch.empty_like(logps), entropy


@register(
    "logps_forward",
    f"(Tensor logits, Tensor? layout, {CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda logits, layout, *flat: fake_forward(logits, flat),
    check=_check_forward,
)
def logps_forward(logits: Tensor, layout: Tensor | None, *flat: Any) -> Any:
    """(workspace, logps, top, log2 total, entropy): Eq. 14; `layout` is that of a shard."""
    call = Call.of(flat)
    kernels = registry.load(call.backend)
    arguments = arguments_of(call, logits.device, logits.shape[2], layout)
    tokens = prepare(kernels, call, arguments)
    logps, entropy = _outputs(logits, call.batch.shape, call.with_entropy)
    top, log_total = torch.empty_like(logps), torch.empty_like(logps)
    wanted = entropy if call.with_entropy else None
    kernels.logps_forward(logits, tokens, None, 0, logps, top, log_total, wanted)
    return tokens.workspace, logps, top, log_total, entropy


# What backward takes of forward: `saved`.
SAVED = "Tensor workspace, Tensor logps, Tensor top, Tensor log_total, Tensor entropy"
# `upstream` multiplies both gradients, if it is given; token_ids are those of a sampling mask, and
# `layout` is that of a shard.
BACKWARD = f"""{SAVED}, Tensor grad_logps, Tensor grad_entropy, Tensor? upstream,
    Tensor? token_ids, Tensor? layout, bool with_entropy, str backend"""


def check_saved(tokens: int, device: torch.device, with_entropy: bool, **tensors: Tensor) -> None:
    """Of tensors of SAVED, and of gradients like them."""
    for name, value in tensors.items():
        if name == "workspace":
            units = units_in(value, tokens)
            if units < 0 or value.numel() != workspace_size(tokens, units):
                raise invalid(name, value, f"what a forward of {tokens} tokens wrote")
            check_is(name, value, torch.float32, device, (value.numel(),))
            continue
        numbers = tokens if with_entropy or "entropy" not in name else 0
        if value.numel() != numbers:
            raise invalid(name, value, f"{numbers} numbers")
        check_is(name, value, torch.float32, device, tuple(value.shape))


def _check_logps_backward(
    logits: Tensor, workspace: Tensor, logps: Tensor, top: Tensor, log_total: Tensor,
    entropy: Tensor, grad_logps: Tensor, grad_entropy: Tensor, upstream: Tensor | None,
    token_ids: Tensor | None, layout: Tensor | None, with_entropy: bool, backend: str,
) -> None:  # fmt: skip
    check_logits("logits", logits, backend)
    check_layout(layout)
    check_saved(
        logits.shape[0] * logits.shape[1], logits.device, with_entropy, workspace=workspace,
        logps=logps, top=top, log_total=log_total, entropy=entropy, grad_logps=grad_logps,
        grad_entropy=grad_entropy,
    )  # fmt: skip
    check_support(workspace, logps.numel(), token_ids, layout, logits.shape[2])
    if upstream is not None:
        check_is("upstream", upstream, torch.float32, logits.device, ())


def check_support(
    workspace: Tensor, tokens: int, token_ids: Tensor | None, layout: Tensor | None, words: int
) -> None:
    """Whether the workspace was written for these, and for logits of so many words."""
    if token_ids is None:
        return
    count = token_ids.numel()
    check_is("token_ids", token_ids, torch.int32, workspace.device, (count,))
    if not may_synchronise(workspace):
        return
    begin, kept, _ = row_tokens(workspace, tokens).supports.long()
    end = begin + kept.clamp(min=0)
    fits = bool(((begin >= 0) & (end <= count)).all())
    if fits:
        steps = token_ids.new_zeros(count + 1, dtype=torch.int64)
        steps = steps.index_add(0, begin, torch.ones_like(begin))
        used = steps.index_add(0, end, torch.full_like(end, -1)).cumsum(0)[:-1] > 0
        column = token_ids[used] - (0 if layout is None else layout[0])
        fits = bool(((column >= 0) & (column < words)).all())
    if not fits:
        raise invalid("token_ids", token_ids, "those that the workspace was written for")


def row_tokens(
    workspace: Tensor, tokens: int, token_ids: Tensor | None = None, layout: Tensor | None = None
) -> Tokens:
    """As much of a workspace as the row kernels read."""
    with_support = token_ids is not None
    found = Tokens(workspace, tokens, 0, 0, 0, False, False, with_support=with_support)
    if token_ids is not None:
        found.support = support_of(token_ids, 0 if layout is None else int(layout[0]))
    return found


def _run_logps_backward(
    logits: Tensor, dlogits: Tensor, workspace: Tensor, logps: Tensor, top: Tensor,
    log_total: Tensor, entropy: Tensor, grad_logps: Tensor, grad_entropy: Tensor,
    upstream: Tensor | None, token_ids: Tensor | None, layout: Tensor | None,
    with_entropy: bool, backend: str,
) -> None:  # fmt: skip
    optional = (entropy, grad_entropy) if with_entropy else (None, None)
    registry.load(backend).logps_backward(
        logits, dlogits, row_tokens(workspace, logps.numel(), token_ids, layout), None, 0, logps,
        top, log_total, optional[0], grad_logps, optional[1], upstream,
    )  # fmt: skip


@register(
    "logps_backward",
    f"(Tensor logits, {BACKWARD}) -> Tensor",
    fake=lambda logits, *rest: empty_gradient(logits),
    check=_check_logps_backward,
)
def logps_backward(logits: Tensor, *rest: Any) -> Tensor:
    """dL/dlogits (Eq. 8)."""
    dlogits = empty_gradient(logits)
    _run_logps_backward(logits, dlogits, *rest)
    return dlogits


def _check_logps_backward_(logits: Tensor, *rest: Any) -> None:
    _check_logps_backward(logits, *rest)
    _check_overwritten("logits", logits)


@register(
    "logps_backward_",
    f"(Tensor(a!) logits, {BACKWARD}) -> ()",
    fake=lambda logits, *rest: None,
    check=_check_logps_backward_,
)
def logps_backward_(logits: Tensor, *rest: Any) -> None:
    _run_logps_backward(logits, logits, *rest)


def _fake_one_pass_(logits: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    logps, entropy = _outputs(logits, call.batch.shape, call.with_entropy)
    return *empty_results(logps, call.batch.num_groups, False), logps, entropy


def _run_one_pass(logits: Tensor, dlogits: Tensor, flat: tuple[Any, ...]) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    kernels = registry.load(call.backend)
    tokens = prepare(kernels, call, arguments_of(call, logits.device, logits.shape[2], None))
    logps, entropy = _outputs(logits, call.batch.shape, call.with_entropy)
    wanted = entropy if call.with_entropy else None
    kernels.one_pass(logits, dlogits, tokens, None, 0, logps, wanted)
    return *finish_tokens(kernels, tokens, logps, wanted, False, False), logps, entropy


@register(
    "one_pass",
    f"(Tensor logits, {CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda logits, *flat: (*_fake_one_pass_(logits, *flat), empty_gradient(logits)),
    check=lambda logits, *flat: _check_one_pass(logits, Call.of(flat)),
)
def one_pass(logits: Tensor, *flat: Any) -> Any:
    """(loss, stats, metrics, logps, entropy, dL/dlogits for an upstream gradient of 1)."""
    dlogits = empty_gradient(logits)
    return *_run_one_pass(logits, dlogits, flat), dlogits


def _check_one_pass(logits: Tensor, call: Call) -> None:
    _check_rows(logits, call)
    if not call.objective.separable or call.per_token or call.objective.advantages is None:
        raise invalid("ratio_level", call.objective.ratio_level, "a sum of terms of one token each")


def _check_one_pass_(logits: Tensor, *flat: Any) -> None:
    _check_one_pass(logits, Call.of(flat))
    _check_overwritten("logits", logits)


@register(
    "one_pass_",
    f"(Tensor(a!) logits, {CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_one_pass_,
    check=_check_one_pass_,
)
def one_pass_(logits: Tensor, *flat: Any) -> Any:
    return _run_one_pass(logits, logits, flat)


def _check_scale(dlogits: Tensor, upstream: Tensor, backend: str) -> None:
    check_logits("dlogits", dlogits, backend)
    check_is("upstream", upstream, torch.float32, dlogits.device, ())
    _check_overwritten("dlogits", dlogits)


@register(
    "scale_",
    "(Tensor(a!) dlogits, Tensor upstream, str backend) -> ()",
    fake=lambda dlogits, upstream, backend: None,
    check=_check_scale,
)
def scale_(dlogits: Tensor, upstream: Tensor, backend: str) -> None:
    """Times the 0-dim upstream; 1 reads and writes nothing."""
    registry.load(backend).scale(dlogits, upstream)


def _check_prepare(logps: Tensor, entropy: Tensor | None, *flat: Any) -> None:
    call = Call.of(flat)
    check_backend(call.backend, logps)
    if tuple(logps.shape) != tuple(call.batch.shape):
        raise invalid("logps", logps, f"shape {tuple(call.batch.shape)}")
    if call.batch.labels is not None:
        raise invalid("labels", call.batch.labels, "None where log-probs are given")
    if call.token_ids is not None:
        raise invalid("token_ids", call.token_ids, "None where log-probs are given")
    if entropy is not None:
        check_float("entropy", entropy)
        if entropy.shape != logps.shape:
            raise invalid("entropy", entropy, f"shape {tuple(logps.shape)}, that of logps")
    call.check(logps.device)


def _fake_prepare(logps: Tensor, entropy: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    workspace, logps, *_, entropy = fake_forward(logps, flat)
    return workspace, logps, entropy


@register(
    "prepare",
    f"(Tensor logps, Tensor? entropy, {CALL}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_prepare,
    check=_check_prepare,
)
def prepare_logps(logps: Tensor, entropy: Tensor | None, *flat: Any) -> Any:
    """(workspace, logps, entropy) of given log-probs: float32, 0 where masked."""
    call = Call.of(flat)
    arguments = arguments_of(call, logps.device, 1, None)
    out, entropy_out = _outputs(logps, call.batch.shape, call.with_entropy)
    arguments.logps, arguments.logps_out = (
        column_of("logps", logps, call.batch.shape, logps.device),
        out,
    )
    if entropy is not None:
        arguments.entropy = column_of("entropy", entropy, call.batch.shape, logps.device)
        arguments.entropy_out = entropy_out
    tokens = prepare(registry.load(call.backend), call, arguments)
    return tokens.workspace, out, entropy_out


FINISH = """SymInt groups, bool on_policy, bool sequence_level, str policy_loss, str? kl,
    bool kl_unbiased, bool with_support, bool empirical_center, bool per_token, bool with_entropy,
    bool with_slopes, str backend"""


def finish_options(call: Call) -> tuple[Any, ...]:
    """In the order of FINISH, less groups, with_slopes and backend."""
    objective = call.objective
    return (
        objective.old_logps is None,
        objective.ratio_level == "sequence",
        objective.policy_loss,
        None if objective.ref_logps is None else objective.kl_estimator,
        objective.kl_unbiased,
        call.batch.sampling_mask is not None,
        objective.empirical_center,
        call.per_token,
        call.with_entropy,
    )


def _empty_slopes(logps: Tensor, with_entropy: bool, wanted: bool) -> Tensor:
    return logps.new_empty((1 + with_entropy, logps.numel()) if wanted else 0)


def _fake_finish(
    workspace: Tensor, logps: Tensor, entropy: Tensor, upstream: Tensor | None, groups: int,
    on_policy: bool, sequence_level: bool, policy_loss: str, kl: str | None, kl_unbiased: bool,
    with_support: bool, empirical_center: bool, per_token: bool, with_entropy: bool,
    with_slopes: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    results = empty_results(logps, groups, per_token)
    slopes = _empty_slopes(logps, with_entropy, with_slopes)
    return *results, torch.empty_like(logps), torch.empty_like(entropy), slopes


def _check_finish(
    workspace: Tensor, logps: Tensor, entropy: Tensor, upstream: Tensor | None, groups: int,
    on_policy: bool, sequence_level: bool, policy_loss: str, kl: str | None, kl_unbiased: bool,
    with_support: bool, empirical_center: bool, per_token: bool, with_entropy: bool,
    with_slopes: bool, backend: str,
) -> None:  # fmt: skip
    check_is("logps", logps, torch.float32, logps.device, tuple(logps.shape))
    check_backend(backend, logps)
    check_saved(logps.numel(), logps.device, with_entropy, workspace=workspace)
    shape = tuple(logps.shape) if with_entropy else (0,)
    check_is("entropy", entropy, torch.float32, logps.device, shape)
    if kl is not None and kl not in KL_ESTIMATORS:
        raise ValueError(f"kl: got {kl!r}, expected one of {KL_ESTIMATORS}, or None")
    check_choice("policy_loss", policy_loss, POLICY_LOSSES)
    units = units_in(workspace, logps.numel())
    named = workspace[workspace.numel() - units :].view(torch.int32)
    if groups < 0 or (may_synchronise(workspace) and max(named.tolist(), default=-1) >= groups):
        raise invalid("groups", groups, "as many as the workspace was written for")
    if upstream is None:
        return
    if upstream.shape != logps.shape or upstream.dtype != torch.float32:
        raise invalid("upstream", upstream, f"float32, shape {tuple(logps.shape)}, that of logps")
    check_device("upstream", upstream, logps.device)


@register(
    "finish",
    f"(Tensor workspace, Tensor logps, Tensor entropy, Tensor? upstream, {FINISH})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_finish,
    check=_check_finish,
)
def finish(
    workspace: Tensor, logps: Tensor, entropy: Tensor, upstream: Tensor | None, groups: int,
    on_policy: bool, sequence_level: bool, policy_loss: str, kl: str | None, kl_unbiased: bool,
    with_support: bool, empirical_center: bool, per_token: bool, with_entropy: bool,
    with_slopes: bool, backend: str,
) -> Any:  # fmt: skip
    """(loss, stats, metrics, logps, entropy, slopes): from log-probs to Eq. 5 and 10.

    Slopes are dL/dlogp and, with entropy, dL/dH: (1, N) or (2, N). `upstream`, like logps, is each
    token's, with reduction "none". The log-probs and entropies returned are copies: the caller may
    change them, and backward reads the others.
    """
    units = units_in(workspace, logps.numel())
    parts = parts_of(units, backend)
    tokens = Tokens(
        workspace, logps.numel(), units, groups, parts, on_policy, sequence_level, policy_loss, kl,
        kl_unbiased, with_support,
    )  # fmt: skip
    slopes = _empty_slopes(logps, with_entropy, with_slopes)
    logps_out, entropy_out = torch.empty_like(logps), torch.empty_like(entropy)
    results = finish_tokens(
        registry.load(backend), tokens, logps, entropy if with_entropy else None,
        empirical_center, per_token, slopes if with_slopes else None,
        column_of("upstream", upstream, logps.shape, logps.device), logps_out,
        entropy_out if with_entropy else None,
    )  # fmt: skip
    return *results, logps_out, entropy_out, slopes


DUAL_STEP = """(Tensor(a!) coef, Tensor weight, Tensor d_sum, Tensor d_sq_sum, bool about_means,
    float target, float lr, float min_coef, float max_coef, str backend) -> ()"""


def _check_dual_step(
    coef: Tensor, weight: Tensor, d_sum: Tensor, d_sq_sum: Tensor, about_means: bool,
    target: float, lr: float, min_coef: float, max_coef: float, backend: str,
) -> None:  # fmt: skip
    check_backend(backend, coef)
    check_is("coef", coef, torch.float32, coef.device, ())
    for name, value in (("weight", weight), ("d_sum", d_sum), ("d_sq_sum", d_sq_sum)):
        check_is(name, value, torch.float32, coef.device, (weight.numel(),))


@register("dual_step", DUAL_STEP, fake=lambda *arguments: None, check=_check_dual_step)
def dual_step(coef: Tensor, *arguments: Any) -> None:
    """Move the dual's coefficient once, in place (Eq. 16)."""
    *others, backend = arguments
    registry.load(backend).dual_step(coef, *others)
