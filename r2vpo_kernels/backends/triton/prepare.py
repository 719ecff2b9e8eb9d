"""The Triton kernel `prepare`: from what the caller gave, where it lies, the workspace."""

import torch
import triton
import triton.language as tl

from ...checks import MIN_TEMPERATURE
from ..calls import NUMBERS
from . import launch
from .workspace import (
    ADVANTAGE,
    BEGIN,
    CENTER,
    CLAMP,
    CLIP_HIGH,
    CLIP_LOW,
    COUNTS,
    DUAL_CLIP,
    END,
    ENTROPY_COEF,
    FACTOR,
    FAULTS,
    GROUP,
    HEADER,
    KL_COEF,
    OLD_LOGP,
    REF_LOGP,
    SHARD_FAULT,
    SUPPORT_BEGIN,
    SUPPORT_COUNT,
    SUPPORT_SIZE,
    TEMPERATURE,
    TICKETS,
    TOKEN_WEIGHT,
    VARIANCE_COEF,
    integers,
    units_of,
)

LEAST_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
OFFSETS = tl.constexpr(1024)


@triton.jit
def _at(column, stride_unit, stride_token, unit, token, inside):
    """A column's elements in its own dtype."""
    place = unit.to(tl.int64) * stride_unit + token.to(tl.int64) * stride_token
    return tl.load(column + place, mask=inside, other=0)


@triton.jit
def _value(column, stride_unit, stride_token, unit, token, inside, absent):
    """A column's elements in float32; without the column the number `absent`."""
    if column is None:
        value = tl.where(inside, absent, 0.0)
    else:
        value = _at(column, stride_unit, stride_token, unit, token, inside).to(tl.float32)
    return value


@triton.jit
def _label(
    labels, labels_unit, labels_token, mask, mask_unit, mask_token, unit, token, inside,
    ignore_index,
):  # fmt: skip
    """The labels of a tile, and which of its tokens are valid."""
    valid = inside
    if mask is not None:
        valid &= _at(mask, mask_unit, mask_token, unit, token, inside) != 0
    label = tl.zeros(inside.shape, tl.int64)
    if labels is not None:
        label = _at(labels, labels_unit, labels_token, unit, token, inside).to(tl.int64)
        valid &= label != ignore_index
    return label, valid


@triton.jit
def _bad_offsets(cu_seqlens, tokens, units):
    """Whether a step is negative, or not of one token where there are as many units as tokens."""
    bad = tl.zeros([OFFSETS], tl.int32)
    for start in range(0, units, OFFSETS):
        unit = start + tl.arange(0, OFFSETS)
        inside = unit < units
        begin = tl.load(cu_seqlens + unit, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + unit + 1, mask=inside, other=0).to(tl.int64)
        bad |= (inside & ((end < begin) | ((units == tokens) & (end - begin != 1)))).to(tl.int32)
    first = tl.load(cu_seqlens).to(tl.int64)
    last = tl.load(cu_seqlens + units).to(tl.int64)
    return (tl.max(bad, 0) > 0) | (first != 0) | (last != tokens)


@triton.jit
def _first_at_least(token_ids, low, high, word, steps):
    """The first of sorted ids from `low` to `high` that is not less than a word, or `high`.

    2^steps is more than there are.
    """
    for _step in range(0, steps):
        middle = (low + high) // 2
        more = low < high
        less = tl.load(token_ids + middle, mask=more, other=0).to(tl.int64) < word
        low = tl.where(more & less, middle + 1, low)
        high = tl.where(more & (less == 0), middle, high)
    return low


@triton.jit
def _support(
    token_ids, offsets, bad_sets, token, valid, label, ids, first_word, words, steps, missing_full
):  # fmt: skip
    """K of Eq. 1 of valid tokens: (begin, count, size, whether the label is missing)."""
    ids = tl.where(bad_sets, 0, ids)
    begin = tl.load(offsets + token, mask=valid, other=0)
    end = tl.load(offsets + token + 1, mask=valid, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), ids)
    end = tl.minimum(tl.maximum(end, begin), ids)
    at = _first_at_least(token_ids, begin, end, label, steps)
    found = tl.load(token_ids + at, mask=at < end, other=-1).to(tl.int64) == label
    full = (begin == end) | ((found == 0) & (missing_full != 0))
    full = (full & (bad_sets == 0)) | (valid == 0)
    first = _first_at_least(token_ids, begin, end, first_word, steps)
    past = _first_at_least(token_ids, begin, end, first_word + words, steps)
    missing = valid & (full == 0) & (found == 0)
    return (
        tl.where(full, 0, first).to(tl.int32),
        tl.where(full, -1, past - first).to(tl.int32),
        tl.where(full, 0, end - begin).to(tl.int32),
        missing,
    )


@triton.jit
def _store_numbers(
    workspace, cu_seqlens, normalizer, tokens, units, bad, factor, kl_coef, entropy_coef, clamp,
    clip_low, clip_high, dual_clip,
):  # fmt: skip
    """What is one for the whole batch; returns whether it, or what is given, is bad."""
    if normalizer is not None:
        given = tl.load(normalizer).to(tl.float32)
        bad |= (given >= 0) == 0
        factor = given
    if cu_seqlens is not None:
        bad |= _bad_offsets(cu_seqlens, tokens, units)
    tl.store(workspace + CLAMP, clamp)
    tl.store(workspace + KL_COEF, kl_coef)
    tl.store(workspace + ENTROPY_COEF, entropy_coef)
    tl.store(workspace + CLIP_LOW, clip_low)
    tl.store(workspace + CLIP_HIGH, clip_high)
    tl.store(workspace + DUAL_CLIP, dual_clip)
    tl.store(workspace + FACTOR, tl.where(bad, float("nan"), factor))
    tl.store(integers(workspace) + TICKETS, 0)
    tl.store(integers(workspace) + TICKETS + 1, 0)
    tl.store(integers(workspace) + SHARD_FAULT, 0)
    return bad


_COLUMNS = (
    "labels", "mask", "old_logps", "advantages", "importance_weights", "variance_coef",
    "temperature", "ref_logps", "logps", "entropy",
)  # fmt: skip


@launch.Kernel
def prepare_kernel(
    workspace, labels, mask, old_logps, advantages, importance_weights, variance_coef, temperature,
    ref_logps, logps, entropy, cu_seqlens, group_ids, center, normalizer, numbers, logps_out,
    entropy_out, activity, token_ids, offsets, largest,
    labels_unit: tl.int64, labels_token: tl.int64,
    mask_unit: tl.int64, mask_token: tl.int64,
    old_logps_unit: tl.int64, old_logps_token: tl.int64,
    advantages_unit: tl.int64, advantages_token: tl.int64,
    importance_weights_unit: tl.int64, importance_weights_token: tl.int64,
    variance_coef_unit: tl.int64, variance_coef_token: tl.int64,
    temperature_unit: tl.int64, temperature_token: tl.int64,
    ref_logps_unit: tl.int64, ref_logps_token: tl.int64,
    logps_unit: tl.int64, logps_token: tl.int64,
    entropy_unit: tl.int64, entropy_token: tl.int64,
    group_ids_stride: tl.int64, center_stride: tl.int64,
    tokens: tl.int64, units: tl.int64, groups: tl.int64,
    unit_length: tl.int64, units_per_group: tl.int64,
    ignore_index: tl.int64, vocabulary: tl.int64, first_word: tl.int64, words: tl.int64,
    ids: tl.int64, sampling_vocabulary: tl.int64, steps: tl.int32, missing_full: tl.int32,
    sparse_head: tl.int32, mean_over_unit: tl.int32, count_kind: tl.int32,
    variance_coef_number: tl.float32, temperature_number: tl.float32, factor: tl.float32,
    kl_coef: tl.float32, entropy_coef: tl.float32, log_ratio_clamp: tl.float32,
    clip_low: tl.float32, clip_high: tl.float32, dual_clip: tl.float32,
    UNITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if numbers is not None:
        variance_coef_number = tl.load(numbers)
        temperature_number = tl.load(numbers + 1)
        factor = tl.load(numbers + 2)
        kl_coef = tl.load(numbers + 3)
        entropy_coef = tl.load(numbers + 4)
        log_ratio_clamp = tl.load(numbers + 5)
        clip_low = tl.load(numbers + 6)
        clip_high = tl.load(numbers + 7)
        dual_clip = tl.load(numbers + 8)
    bad_sets = False
    if largest is not None:
        bad_sets = tl.load(largest) >= sampling_vocabulary
    bad_tile = tl.zeros([UNITS, TOKENS], tl.int32)
    counted = tl.zeros([UNITS, 1], tl.int32)
    for tile in range(program, tl.cdiv(units, UNITS), tl.num_programs(0)):
        unit = tile * UNITS + tl.arange(0, UNITS)[:, None].to(tl.int64)
        known = unit < units
        if cu_seqlens is not None:
            begin = tl.load(cu_seqlens + unit, mask=known, other=0).to(tl.int64)
            end = tl.load(cu_seqlens + unit + 1, mask=known, other=0).to(tl.int64)
            # Wrong offsets leave no token out either: row kernels go where its support says.
            begin = tl.where(unit == 0, 0, begin)
            end = tl.where(unit == units - 1, tokens, end)
        else:
            begin = unit * unit_length
            end = begin + unit_length
        begin = tl.minimum(tl.maximum(begin, 0), tokens)
        end = tl.where(known, tl.minimum(tl.maximum(end, begin), tokens), begin).to(tl.int32)
        begin = begin.to(tl.int32)
        group = tl.zeros([UNITS, 1], tl.int64)
        if group_ids is not None:
            group = tl.load(group_ids + unit * group_ids_stride, mask=known, other=0).to(tl.int64)
        elif units_per_group > 0:
            group = unit // units_per_group
        bad_group = (group < 0) | (group >= groups)
        group = tl.maximum(tl.minimum(group, groups - 1), 0)
        fields = units_of(workspace, tokens) + unit
        tl.store(fields + units * BEGIN, begin, mask=known)
        tl.store(fields + units * END, end, mask=known)
        tl.store(fields + units * GROUP, group.to(tl.int32), mask=known)
        longest = tl.max(end - begin)

        unit_weight = tl.full([UNITS, 1], 1.0, tl.float32)
        if mean_over_unit:
            seen = tl.zeros([UNITS, TOKENS], tl.int32)
            for start in range(0, longest, TOKENS):
                token = begin + start + tl.arange(0, TOKENS)[None, :]
                label, valid = _label(
                    labels, labels_unit, labels_token, mask, mask_unit, mask_token, unit, token,
                    token < end, ignore_index,
                )  # fmt: skip
                seen += valid.to(tl.int32)
            unit_weight = tl.div_rn(unit_weight, tl.sum(seen, 1, keep_dims=True).to(tl.float32))
        unit_weight = tl.where(bad_group, float("nan"), unit_weight)
        center_t = tl.zeros([UNITS, 1], tl.float32)
        if center is not None:
            given = tl.load(center + group * center_stride, mask=known & (bad_group == 0), other=1)
            center_t = given.to(tl.float32) - 1.0

        seen = tl.zeros([UNITS, TOKENS], tl.int32)
        for start in range(0, longest, TOKENS):
            token = begin + start + tl.arange(0, TOKENS)[None, :]
            inside = token < end
            label, valid = _label(
                labels, labels_unit, labels_token, mask, mask_unit, mask_token, unit, token, inside,
                ignore_index,
            )  # fmt: skip
            seen += valid.to(tl.int32)
            bad = bad_group
            word = tl.zeros([UNITS, TOKENS], tl.int32)
            if labels is not None:
                outside = (label < 0) | (label >= vocabulary)
                bad |= outside
                here = (outside == 0) & (label >= first_word) & (label - first_word < words)
            place = workspace + HEADER + token
            size = tl.zeros([UNITS, TOKENS], tl.int32)
            kept = tl.full([UNITS, TOKENS], -1, tl.int32)
            if token_ids is not None:
                first, kept, size, missing = _support(
                    token_ids, offsets, bad_sets, token, valid & (outside == 0), label, ids,
                    first_word, words, steps, missing_full,
                )  # fmt: skip
                bad |= missing
                here &= missing == 0
                row = integers(workspace) + HEADER + token
                tl.store(row + tokens * SUPPORT_BEGIN, first, mask=inside)
                tl.store(row + tokens * SUPPORT_COUNT, kept, mask=inside)
                tl.store(row + tokens * SUPPORT_SIZE, size, mask=inside)
            if labels is not None:
                word = tl.where(here, label - first_word, words).to(tl.int32)
            word = tl.where(valid, word, -1)
            tl.store(integers(workspace) + HEADER + token, word, mask=inside)

            value = _value(
                temperature, temperature_unit, temperature_token, unit, token, valid,
                temperature_number,
            )  # fmt: skip
            low = (value >= LEAST_TEMPERATURE) == 0
            bad |= low
            value = tl.where(valid, tl.where(low, float("nan"), value), 1.0)
            tl.store(place + tokens * TEMPERATURE, value, mask=inside)

            coef = _value(
                variance_coef, variance_coef_unit, variance_coef_token, unit, token, valid,
                variance_coef_number,
            )  # fmt: skip
            low = (coef >= 0) == 0
            bad |= low
            coef = tl.where(low, float("nan"), coef)
            tl.store(place + tokens * VARIANCE_COEF, coef, mask=inside)
            bad_tile |= (bad & valid).to(tl.int32)

            value = tl.where(valid, unit_weight, 0.0)
            tl.store(place + tokens * TOKEN_WEIGHT, value, mask=inside)
            value = _value(old_logps, old_logps_unit, old_logps_token, unit, token, valid, 0.0)
            tl.store(place + tokens * OLD_LOGP, value, mask=inside)
            value = _value(ref_logps, ref_logps_unit, ref_logps_token, unit, token, valid, 0.0)
            tl.store(place + tokens * REF_LOGP, value, mask=inside)
            advantage = _value(
                advantages, advantages_unit, advantages_token, unit, token, valid, 0.0
            )
            if importance_weights is not None:
                advantage *= _at(
                    importance_weights, importance_weights_unit, importance_weights_token,
                    unit, token, valid,
                ).to(tl.float32)  # fmt: skip
            tl.store(place + tokens * ADVANTAGE, advantage, mask=inside)
            distance = tl.where(valid, center_t, 0.0)
            tl.store(place + tokens * CENTER, distance, mask=inside)

            if logps_out is not None:
                value = _at(logps, logps_unit, logps_token, unit, token, valid).to(tl.float32)
                tl.store(logps_out + token, value, mask=inside)
            if entropy_out is not None:
                value = _at(entropy, entropy_unit, entropy_token, unit, token, valid)
                tl.store(entropy_out + token, value.to(tl.float32), mask=inside)
            if activity is not None:
                # Eq. 7 and dL/dH are 0 whatever the logits.
                level = coef == 0
                if old_logps is None:
                    level |= distance == 0
                still = (advantage == 0) & level
                still &= tl.full(still.shape, kl_coef, tl.float32) == 0
                still &= tl.full(still.shape, entropy_coef, tl.float32) == 0
                # The one word of its set has all the probability.
                still |= size == 1
                value = tl.where(valid, still.to(tl.int32), 2)
                value = tl.where((kept >= 0) & (sparse_head != 0), 3, value)
                tl.store(activity + token, value.to(tl.uint8), mask=inside)
        found = tl.sum(seen, 1, keep_dims=True)
        counted += tl.where(count_kind == 1, found, (found > 0).to(tl.int32))

    count = tl.sum(counted)
    if count_kind == 0:
        count = (program == 0).to(tl.int32)
    tl.store(integers(workspace) + COUNTS + program, count)
    fault = tl.max(bad_tile) > 0
    if program == 0:
        fault |= _store_numbers(
            workspace, cu_seqlens, normalizer, tokens, units, bad_sets, factor, kl_coef,
            entropy_coef, log_ratio_clamp, clip_low, clip_high, dual_clip,
        )  # fmt: skip
    tl.store(workspace + FAULTS + program, fault.to(tl.float32))


def prepare(p) -> None:
    """Write the workspace, and what is given of the outputs, from the arguments of a call."""
    t = p.tokens
    columns = [getattr(p, name) for name in _COLUMNS]
    given = torch.is_tensor(p.numbers)
    unit_tile, token_tile = launch.tile_shape(t.tokens, t.units)
    sets, ids, missing_full = (None, None, None), 0, 0
    if p.sampling_mask is not None:
        sets, ids = p.sampling_mask.tensors(), p.sampling_mask.token_ids.shape[0]
        missing_full = int(p.sampling_mask.missing_label == "full")
    prepare_kernel(
        t.parts,
        (
            t.workspace, *[column.tensor for column in columns], p.cu_seqlens, p.group_ids,
            p.center, p.normalizer, p.numbers if given else None, p.logps_out, p.entropy_out,
            p.activity, *sets,
        ),
        (
            *[stride for column in columns for stride in column[1:]],
            0 if p.group_ids is None else p.group_ids.stride(0),
            0 if p.center is None else p.center.stride(0),
            t.tokens, t.units, t.groups, p.unit_length, p.units_per_group, p.ignore_index,
            p.vocabulary, p.first_word, p.words, ids, p.sampling_vocabulary, ids.bit_length(),
            missing_full, int(p.sparse_head), int(p.mean_over_unit), p.count_kind,
            *((0.0,) * NUMBERS if given else p.numbers),
        ),
        UNITS=unit_tile, TOKENS=token_tile,
    )  # fmt: skip
