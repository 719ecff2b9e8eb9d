"""Triton kernels from log-probs to the loss: `means` of groups, and `finish`.

Both go over units; a tile is UNITS units by TOKENS tokens. Each program sums its units' moments in
float64; the last to finish, by a ticket, adds what all have found, in the order of units and
programs. Nothing is added by atomics but the ticket.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .math import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    center_slope,
    difference,
    entropy_slope,
    kl_term,
    logp_slope,
    loss_value,
    nan_maximum,
    nan_minimum,
    penalty_term,
    policy_term,
    ratio_of,
    ratio_slope,
)
from .workspace import (
    ADVANTAGE,
    BEGIN,
    CENTER,
    CLAMP,
    CLIP_HIGH,
    CLIP_LOW,
    DUAL_CLIP,
    END,
    ENTROPY_COEF,
    GROUP,
    HEADER,
    KL_COEF,
    OLD_LOGP,
    REF_LOGP,
    SUPPORT_SIZE,
    TICKETS,
    TOKEN_WEIGHT,
    VARIANCE_COEF,
    denominator,
    integers,
    units_of,
)

# Moments of a unit in `means` and in `finish`; sums of a program in `finish`.
MEANS_MOMENTS = tl.constexpr(4)
FINISH_MOMENTS = tl.constexpr(3)
TOTALS = tl.constexpr(17)
# Units that the last program adds at a time where they have one group, and where it compares their
# groups; also the groups whose sums it reads at a time.
TILE = tl.constexpr(512)
PAIRS = tl.constexpr(32)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _units(workspace, tokens, units, tile, UNITS: tl.constexpr):
    """A tile's units, which of them exist, where they begin and end, their groups: (UNITS, 1)."""
    unit = tile * UNITS + tl.arange(0, UNITS)[:, None]
    known = unit < units
    place = units_of(workspace, tokens) + unit
    begin = tl.load(place + units * BEGIN, mask=known, other=0)
    end = tl.load(place + units * END, mask=known, other=0)
    group = tl.load(place + units * GROUP, mask=known, other=0)
    return unit, known, begin, end, group


@triton.jit
def _valid(workspace, begin, end, start, TOKENS: tl.constexpr):
    """The tokens of a step through units, which are the units' own, which of these not masked."""
    token = begin + start + tl.arange(0, TOKENS)[None, :]
    inside = token < end
    label = tl.load(integers(workspace) + HEADER + token, mask=inside, other=-1)
    return token, inside, label >= 0


@triton.jit
def _raw(place, tokens, logp, valid, ON_POLICY: tl.constexpr):
    # On-policy 0, and NaN where logp is.
    old_logp = logp if ON_POLICY else tl.load(place + tokens * OLD_LOGP, mask=valid, other=0.0)
    return difference(logp, old_logp)


@triton.jit
def _sequence_mean(
    workspace, tokens, logps, begin, end, longest,
    ON_POLICY: tl.constexpr, UNITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Eq. 11, not yet clamped, and the valid tokens of each unit, 0 counted as 1: (UNITS, 1)."""
    total = tl.zeros([UNITS, TOKENS], tl.float64)
    count = tl.zeros([UNITS, TOKENS], tl.int32)
    for start in range(0, longest, TOKENS):
        token, _inside, valid = _valid(workspace, begin, end, start, TOKENS)
        logp = tl.load(logps + token, mask=valid, other=0.0)
        raw = _raw(workspace + HEADER + token, tokens, logp, valid, ON_POLICY)
        total += tl.where(valid, raw, 0.0).to(tl.float64)
        count += valid.to(tl.int32)
    count = tl.maximum(tl.sum(count, 1, keep_dims=True), 1)
    return (tl.sum(total, 1, keep_dims=True) / count.to(tl.float64)).to(tl.float32), count


@triton.jit
def _upstream(upstream, stride_unit, stride_token, unit, token, valid):
    if upstream is None:
        factor = tl.where(valid, 1.0, 0.0)
    else:
        place = unit.to(tl.int64) * stride_unit + token.to(tl.int64) * stride_token
        factor = tl.load(upstream + place, mask=valid, other=0.0)
    return factor


@triton.jit
def _is_last(workspace, TICKET: tl.constexpr):
    """Whether all other programs have stored what they found; for the last program alone."""
    # The barrier puts every thread's stores before the ticket, which is one thread's.
    tl.debug_barrier()
    place = integers(workspace) + TICKETS + TICKET
    last = tl.atomic_add(place, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(place, 0)
    return last


@triton.jit
def _sum_by_group(moments, sums, unit_groups, units, groups, MOMENTS: tl.constexpr):
    """sums[k, g] = Σ moments[k, u] over the units u of group g, tile by tile of units."""
    for start in range(0, groups * MOMENTS, TILE):
        place = start + tl.arange(0, TILE)
        tl.store(sums + place, tl.zeros([TILE], tl.float64), mask=place < groups * MOMENTS)
    tl.debug_barrier()
    for tile in range(0, units, TILE):
        unit = tile + tl.arange(0, TILE)
        first = tl.load(unit_groups + tile)
        others = tl.load(unit_groups + unit, mask=unit < units, other=first) != first
        if tl.max(others.to(tl.int32), 0) == 0:
            _add_units(moments, sums, unit_groups, tile, units, groups, MOMENTS, 1, TILE)
        else:
            for start in range(tile, tl.minimum(tile + TILE, units), PAIRS):
                _add_units(moments, sums, unit_groups, start, units, groups, MOMENTS, PAIRS, PAIRS)


@triton.jit
def _add_units(
    moments, sums, unit_groups, start, units, groups,
    MOMENTS: tl.constexpr, SLOTS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Of UNITS units from `start` on, whose groups the first SLOTS have, to the sums of groups.

    The first unit of each group adds what all have of its group.
    """
    unit = start + tl.arange(0, UNITS)[:, None]
    group = tl.load(unit_groups + unit, mask=unit < units, other=-1)
    slot = start + tl.arange(0, SLOTS)[None, :]
    slot_group = tl.load(unit_groups + slot, mask=slot < units, other=-2)
    same = slot_group == group
    earlier = tl.sum((same & (unit < slot)).to(tl.int32), 0, keep_dims=True)
    first = (slot < units) & (earlier == 0)
    for k in tl.static_range(MOMENTS):
        moment = tl.load(
            moments + k * units + unit, mask=unit < units, other=0.0, cache_modifier=".cg"
        )
        part = tl.sum(tl.where(same, moment, 0.0), 0, keep_dims=True)
        place = sums + k * groups + slot_group
        part += tl.load(place, mask=first, other=0.0, cache_modifier=".cg")
        tl.store(place, part, mask=first)
    tl.debug_barrier()


@triton.jit
def _group_sum(sums, groups, ROW: tl.constexpr, group):
    place = sums + ROW * groups + group
    return tl.load(place, mask=group < groups, other=0.0, cache_modifier=".cg")


@launch.Kernel
def means_kernel(
    workspace, logps, upstream, means, scratch,
    tokens: tl.int64, units: tl.int64, groups: tl.int64,
    upstream_unit: tl.int64, upstream_token: tl.int64,
    ON_POLICY: tl.constexpr, SEQUENCE: tl.constexpr,
    UNITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Eq. 9: μ - 1 and κ of each group."""
    clamp = tl.load(workspace + CLAMP)
    for tile in range(tl.program_id(0), tl.cdiv(units, UNITS), tl.num_programs(0)):
        unit, known, begin, end, group = _units(workspace, tokens, units, tile, UNITS)
        longest = tl.max(end - begin)
        if SEQUENCE:
            unit_raw, _count = _sequence_mean(
                workspace, tokens, logps, begin, end, longest, ON_POLICY, UNITS, TOKENS
            )
        weight_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        d_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        coef_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        coef_d_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        for start in range(0, longest, TOKENS):
            token, _inside, valid = _valid(workspace, begin, end, start, TOKENS)
            place = workspace + HEADER + token
            if SEQUENCE:
                raw = unit_raw
            else:
                logp = tl.load(logps + token, mask=valid, other=0.0)
                raw = _raw(place, tokens, logp, valid, ON_POLICY)
            d = ratio_of(raw, clamp).d.to(tl.float64)
            weight = tl.load(place + tokens * TOKEN_WEIGHT, mask=valid, other=0.0).to(tl.float64)
            coef = tl.load(place + tokens * VARIANCE_COEF, mask=valid, other=0.0).to(tl.float64)
            coef *= weight * _upstream(upstream, upstream_unit, upstream_token, unit, token, valid)
            weight_sum += weight
            d_sum += tl.where(valid, weight * d, 0.0)
            coef_sum += coef
            coef_d_sum += tl.where(valid, coef * d, 0.0)
        unit_moments = scratch + unit
        tl.store(unit_moments, tl.sum(weight_sum, 1, keep_dims=True), mask=known)
        tl.store(unit_moments + units, tl.sum(d_sum, 1, keep_dims=True), mask=known)
        tl.store(unit_moments + 2 * units, tl.sum(coef_sum, 1, keep_dims=True), mask=known)
        tl.store(unit_moments + 3 * units, tl.sum(coef_d_sum, 1, keep_dims=True), mask=known)
    if _is_last(workspace, 0):
        sums = scratch + units * MEANS_MOMENTS
        unit_groups = units_of(workspace, tokens) + units * GROUP
        _sum_by_group(scratch, sums, unit_groups, units, groups, MEANS_MOMENTS)
        for start in range(0, groups, PAIRS):
            group = start + tl.arange(0, PAIRS)
            weight = _group_sum(sums, groups, 0, group)
            empty = weight == 0
            weight = tl.where(empty, 1.0, weight)
            mean = tl.where(empty, 0.0, _group_sum(sums, groups, 1, group) / weight)
            kappa = _group_sum(sums, groups, 3, group) - mean * _group_sum(sums, groups, 2, group)
            kappa = tl.where(empty, 0.0, kappa / weight)
            tl.store(means + group, mean.to(tl.float32), mask=group < groups)
            tl.store(means + groups + group, kappa.to(tl.float32), mask=group < groups)


@triton.jit
def _total(scratch, ROW: tl.constexpr, MOST: tl.constexpr):
    """The sum of what all programs stored as their total ROW."""
    program = tl.arange(0, MOST)
    known = program < tl.num_programs(0)
    place = scratch + ROW * tl.num_programs(0) + program
    return tl.sum(tl.load(place, mask=known, other=0.0, cache_modifier=".cg"), 0)


@triton.jit
def _extreme(scratch, ROW: tl.constexpr, absent, MOST: tl.constexpr):
    program = tl.arange(0, MOST)
    known = program < tl.num_programs(0)
    place = scratch + ROW * tl.num_programs(0) + program
    return tl.load(place, mask=known, other=absent, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _store_metrics(
    metrics, scratch, SUPPORT: tl.constexpr, POLICY: tl.constexpr, MOST: tl.constexpr
):
    valid = _total(scratch, 0, MOST)
    count = tl.maximum(valid, 1.0)
    d_mean = _total(scratch, 1, MOST) / count
    d_sq_mean = _total(scratch, 2, MOST) / count
    lowest = tl.reduce(_extreme(scratch, 10, INFINITY, MOST), 0, nan_minimum)
    highest = tl.reduce(_extreme(scratch, 11, -INFINITY, MOST), 0, nan_maximum)
    mean = 1.0 + d_mean
    variance = d_sq_mean - d_mean * d_mean
    variance = tl.where(variance < 0, 0.0, variance)
    second = mean * mean + variance
    ess = tl.where(second == 0, 1.0, mean * mean / tl.where(second == 0, 1.0, second))
    tl.store(metrics, mean.to(tl.float32))
    tl.store(metrics + 1, variance.to(tl.float32))
    tl.store(metrics + 2, tl.where(valid == 0, 1.0, 1.0 + lowest))
    tl.store(metrics + 3, tl.where(valid == 0, 1.0, 1.0 + highest))
    tl.store(metrics + 4, ess.to(tl.float32))
    tl.store(metrics + 5, (_total(scratch, 3, MOST) / count).to(tl.float32))
    tl.store(metrics + 6, (_total(scratch, 4, MOST) / count).to(tl.float32))
    tl.store(metrics + 7, _total(scratch, 5, MOST).to(tl.float32))
    tl.store(metrics + 8, _total(scratch, 6, MOST).to(tl.float32))
    tl.store(metrics + 9, (_total(scratch, 7, MOST) / count).to(tl.float32))
    tl.store(metrics + 10, (_total(scratch, 8, MOST) / count).to(tl.float32))
    single = 0.0
    size = 0.0
    if SUPPORT:
        single = (_total(scratch, 12, MOST) / count).to(tl.float32)
        sets = tl.maximum(_total(scratch, 13, MOST), 1.0)
        size = (_total(scratch, 14, MOST) / sets).to(tl.float32)
    tl.store(metrics + 11, single)
    tl.store(metrics + 12, size)
    low = 0.0
    high = 0.0
    if POLICY > 0:
        low = (_total(scratch, 15, MOST) / count).to(tl.float32)
        high = (_total(scratch, 16, MOST) / count).to(tl.float32)
    tl.store(metrics + 13, low)
    tl.store(metrics + 14, high)


@launch.Kernel
def finish_kernel(
    workspace, logps, entropy, upstream, means, loss, stats, metrics, dlogps, dentropy, logps_out,
    entropy_out, scratch, tokens: tl.int64, units: tl.int64, groups: tl.int64, parts: tl.int32,
    upstream_unit: tl.int64, upstream_token: tl.int64,
    ON_POLICY: tl.constexpr, SEQUENCE: tl.constexpr, POLICY: tl.constexpr, KL: tl.constexpr,
    UNBIASED: tl.constexpr, PER_TOKEN: tl.constexpr, SUPPORT: tl.constexpr,
    UNITS: tl.constexpr, TOKENS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Eq. 5 to 7 and 9 to 11 from log-probs."""
    # Whether a token has a slope besides its share of the sequence's.
    OWN: tl.constexpr = POLICY == 2 or KL > 0
    clamp = tl.load(workspace + CLAMP)
    kl_coef = tl.load(workspace + KL_COEF)
    entropy_coef = tl.load(workspace + ENTROPY_COEF)
    clip_low = tl.load(workspace + CLIP_LOW)
    clip_high = tl.load(workspace + CLIP_HIGH)
    dual_clip = tl.load(workspace + DUAL_CLIP)
    divisor = denominator(workspace, parts)
    moments = scratch + tl.num_programs(0) * TOTALS
    valid_count = tl.zeros([UNITS, TOKENS], tl.int32)
    clamped_count = tl.zeros([UNITS, TOKENS], tl.int32)
    d_total = tl.zeros([UNITS, TOKENS], tl.float64)
    d_sq_total = tl.zeros([UNITS, TOKENS], tl.float64)
    old_kl_total = tl.zeros([UNITS, TOKENS], tl.float64)
    policy_total = tl.zeros([UNITS, TOKENS], tl.float64)
    penalty_total = tl.zeros([UNITS, TOKENS], tl.float64)
    kl_total = tl.zeros([UNITS, TOKENS], tl.float64)
    entropy_total = tl.zeros([UNITS, TOKENS], tl.float64)
    loss_total = tl.zeros([UNITS, TOKENS], tl.float64)
    lowest = tl.full([UNITS, TOKENS], INFINITY, tl.float32)
    highest = tl.full([UNITS, TOKENS], -INFINITY, tl.float32)
    single_count = tl.zeros([UNITS, TOKENS], tl.int32)
    set_count = tl.zeros([UNITS, TOKENS], tl.int32)
    word_count = tl.zeros([UNITS, TOKENS], tl.int64)
    low_count = tl.zeros([UNITS, TOKENS], tl.int32)
    high_count = tl.zeros([UNITS, TOKENS], tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(units, UNITS), tl.num_programs(0)):
        unit, known, begin, end, group = _units(workspace, tokens, units, tile, UNITS)
        longest = tl.max(end - begin)
        if SEQUENCE:
            unit_raw, unit_count = _sequence_mean(
                workspace, tokens, logps, begin, end, longest, ON_POLICY, UNITS, TOKENS
            )
        if means is not None:
            unit_center = tl.load(means + group, mask=known, other=0.0)
            kappa = tl.load(means + groups + group, mask=known, other=0.0)
        weight_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        d_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        d_sq_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        slope_sum = tl.zeros([UNITS, TOKENS], tl.float64)
        for start in range(0, longest, TOKENS):
            token, inside, valid = _valid(workspace, begin, end, start, TOKENS)
            place = workspace + HEADER + token
            logp = tl.load(logps + token, mask=valid, other=0.0)
            if SEQUENCE:
                raw = tl.where(valid, unit_raw, 0.0)
            else:
                raw = _raw(place, tokens, logp, valid, ON_POLICY)
            r = ratio_of(raw, clamp)
            token_weight = tl.load(place + tokens * TOKEN_WEIGHT, mask=valid, other=0.0)
            # Where D is NaN, it is so at masked tokens too.
            weight = tl.where(valid, tl.div_rn(token_weight, divisor), 0.0)
            advantage = tl.load(place + tokens * ADVANTAGE, mask=valid, other=0.0)
            coef = tl.load(place + tokens * VARIANCE_COEF, mask=valid, other=0.0)
            if means is not None:
                center = unit_center
            else:
                center = tl.load(place + tokens * CENTER, mask=valid, other=0.0)
            policy = policy_term(advantage, logp, r, clip_low, clip_high, dual_clip, POLICY)
            penalty = penalty_term(coef, center, r)
            ref_logp = tl.load(place + tokens * REF_LOGP, mask=valid, other=0.0)
            kl = kl_term(logp, ref_logp, clamp, r, KL, UNBIASED)
            if KL > 0:
                kl_total += kl.value.to(tl.float64)
            entropy_t = 0.0
            if entropy is not None:
                entropy_t = tl.load(entropy + token, mask=valid, other=0.0)
                entropy_total += entropy_t.to(tl.float64)
                if entropy_out is not None:
                    tl.store(entropy_out + token, entropy_t, mask=inside)
            if logps_out is not None:
                tl.store(logps_out + token, logp, mask=inside)
            loss_t = loss_value(weight, policy, penalty, kl_coef, kl, entropy_coef, entropy_t)
            loss_t = tl.where(valid, loss_t, 0.0)
            if PER_TOKEN:
                tl.store(loss + token, loss_t, mask=inside)
            else:
                loss_total += loss_t.to(tl.float64)

            valid_count += valid.to(tl.int32)
            if SUPPORT:
                row = integers(workspace) + HEADER + token
                size = tl.load(row + tokens * SUPPORT_SIZE, mask=valid, other=0)
                single_count += (size == 1).to(tl.int32)
                set_count += (size > 0).to(tl.int32)
                word_count += size.to(tl.int64)
            if POLICY > 0:
                low_count += (policy.low & valid).to(tl.int32)
                high_count += (policy.high & valid).to(tl.int32)
            clamped_count += (r.clamped & valid).to(tl.int32)
            policy_total += (weight * policy.value).to(tl.float64)
            penalty_total += tl.where(valid, weight * penalty.value, 0.0).to(tl.float64)
            old_kl_total += tl.where(valid, r.d - r.delta, 0.0).to(tl.float64)
            lowest = nan_minimum(lowest, tl.where(valid, r.d, INFINITY))
            highest = nan_maximum(highest, tl.where(valid, r.d, -INFINITY))
            wide = tl.where(valid, r.d, 0.0).to(tl.float64)
            d_total += wide
            d_sq_total += wide * wide
            weight_sum += token_weight.to(tl.float64)
            d_sum += token_weight.to(tl.float64) * wide
            d_sq_sum += token_weight.to(tl.float64) * (wide * wide)

            if dlogps is not None:
                above = weight * _upstream(
                    upstream, upstream_unit, upstream_token, unit, token, valid
                )
                slope = ratio_slope(policy, penalty, kl_coef, kl, above)
                if means is not None:
                    slope -= weight * center_slope(r, kappa)
                own = logp_slope(policy, kl_coef, kl, above)
                if SEQUENCE:
                    slope_sum += tl.where(valid, slope, 0.0).to(tl.float64)
                    slope = own
                elif OWN:
                    slope += own
                if OWN or not SEQUENCE:
                    tl.store(dlogps + token, tl.where(valid, slope, 0.0), mask=inside)
                if dentropy is not None:
                    slope = tl.where(valid, entropy_slope(entropy_coef, above), 0.0)
                    tl.store(dentropy + token, slope, mask=inside)
        unit_moments = moments + unit
        tl.store(unit_moments, tl.sum(weight_sum, 1, keep_dims=True), mask=known)
        tl.store(unit_moments + units, tl.sum(d_sum, 1, keep_dims=True), mask=known)
        tl.store(unit_moments + 2 * units, tl.sum(d_sq_sum, 1, keep_dims=True), mask=known)

        if SEQUENCE and dlogps is not None:
            # Eq. 11: each token has the same share of its sequence's slope, besides what is there,
            # which another thread may have stored.
            share = tl.sum(slope_sum, 1, keep_dims=True) / unit_count.to(tl.float64)
            if OWN:
                tl.debug_barrier()
            for start in range(0, longest, TOKENS):
                token, inside, valid = _valid(workspace, begin, end, start, TOKENS)
                slope = tl.where(valid, share.to(tl.float32), 0.0)
                if OWN:
                    slope += tl.load(dlogps + token, mask=inside, other=0.0)
                tl.store(dlogps + token, slope, mask=inside)

    totals = scratch + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(totals, tl.sum(valid_count).to(tl.float64))
    tl.store(totals + programs, tl.sum(d_total))
    tl.store(totals + 2 * programs, tl.sum(d_sq_total))
    tl.store(totals + 3 * programs, tl.sum(clamped_count).to(tl.float64))
    tl.store(totals + 4 * programs, tl.sum(old_kl_total))
    tl.store(totals + 5 * programs, tl.sum(policy_total))
    tl.store(totals + 6 * programs, tl.sum(penalty_total))
    tl.store(totals + 7 * programs, tl.sum(kl_total))
    tl.store(totals + 8 * programs, tl.sum(entropy_total))
    tl.store(totals + 9 * programs, tl.sum(loss_total))
    tl.store(totals + 10 * programs, tl.reduce(lowest, None, nan_minimum).to(tl.float64))
    tl.store(totals + 11 * programs, tl.reduce(highest, None, nan_maximum).to(tl.float64))
    if SUPPORT:
        tl.store(totals + 12 * programs, tl.sum(single_count).to(tl.float64))
        tl.store(totals + 13 * programs, tl.sum(set_count).to(tl.float64))
        tl.store(totals + 14 * programs, tl.sum(word_count).to(tl.float64))
    if POLICY > 0:
        tl.store(totals + 15 * programs, tl.sum(low_count).to(tl.float64))
        tl.store(totals + 16 * programs, tl.sum(high_count).to(tl.float64))
    if _is_last(workspace, 1):
        _store_metrics(metrics, scratch, SUPPORT, POLICY, MOST)
        if not PER_TOKEN:
            tl.store(loss, _total(scratch, 9, MOST).to(tl.float32))
        sums = moments + units * FINISH_MOMENTS
        unit_groups = units_of(workspace, tokens) + units * GROUP
        _sum_by_group(moments, sums, unit_groups, units, groups, FINISH_MOMENTS)
        for start in range(0, groups, PAIRS):
            group = start + tl.arange(0, PAIRS)
            for k in tl.static_range(FINISH_MOMENTS):
                value = _group_sum(sums, groups, k, group).to(tl.float32)
                tl.store(stats + k * groups + group, value, mask=group < groups)


def _programs(tokens: int, units: int) -> tuple[int, int, int]:
    """Units and tokens of a tile, and how many programs go over the tiles."""
    unit_tile, token_tile = launch.tile_shape(tokens, units)
    return unit_tile, token_tile, max(1, min(-(-units // unit_tile), launch.MOST_PROGRAMS))


def means(t, logps, upstream, means) -> None:
    """Write Eq. 9's μ - 1 and κ of each group into means (2, G)."""
    unit_tile, token_tile, programs = _programs(t.tokens, t.units)
    size = MEANS_MOMENTS.value * (t.units + t.groups)
    scratch = t.workspace.new_empty(size, dtype=torch.float64)
    means_kernel(
        programs, (t.workspace, logps, upstream.tensor, means, scratch),
        (t.tokens, t.units, t.groups, upstream.stride_unit, upstream.stride_token),
        ON_POLICY=t.on_policy, SEQUENCE=t.sequence_level,
        UNITS=unit_tile, TOKENS=token_tile,
    )  # fmt: skip


def finish(
    t, logps, entropy, upstream, means, loss, stats, metrics, dlogps, dentropy, logps_out=None,
    entropy_out=None,
) -> None:  # fmt: skip
    """Write the loss, the groups' moments, the metrics and, if given, dL/dlogp and dL/dH.

    And copies of logps and entropy, if given.
    """
    unit_tile, token_tile, programs = _programs(t.tokens, t.units)
    size = TOTALS.value * programs + FINISH_MOMENTS.value * (t.units + t.groups)
    scratch = t.workspace.new_empty(size, dtype=torch.float64)
    finish_kernel(
        programs,
        (
            t.workspace, logps, entropy, upstream.tensor, means, loss, stats, metrics, dlogps,
            dentropy, logps_out, entropy_out, scratch,
        ),
        (t.tokens, t.units, t.groups, t.parts, upstream.stride_unit, upstream.stride_token),
        ON_POLICY=t.on_policy, SEQUENCE=t.sequence_level, POLICY=POLICY_LOSSES[t.policy_loss],
        KL=KL_ESTIMATORS[t.kl], UNBIASED=t.kl_unbiased, PER_TOKEN=loss.dim() == 1,
        SUPPORT=t.with_support, UNITS=unit_tile, TOKENS=token_tile, MOST=launch.MOST_PROGRAMS,
    )  # fmt: skip
