"""The kernels over tokens once more: Python loops in float64, over one token after another.

Nothing of the package is used. Each number comes with its bound, from docs/derivation: log-probs
are exact here, so δlogp = 0 in Eq. 20, and the rest is the roundings of Eq. 21 to 26.
"""

import math
from collections import defaultdict
from ctypes import c_float
from dataclasses import dataclass, field

U = 2.0**-24
LN_2 = math.log(2.0)
FIELDS = (
    "label", "temperature", "weight", "old_logps", "advantages", "variance_coef", "center",
    "ref_logps",
)  # fmt: skip
METRICS = (
    "ratio/mean", "ratio/var", "ratio/min", "ratio/max", "ratio/ess", "ratio/clamped", "kl/old",
    "loss/policy", "loss/penalty", "kl/ref", "entropy", "support/single", "support/size",
    "clip/low", "clip/high",
)  # fmt: skip


def f32(x):
    return c_float(x).value


@dataclass
class Given:
    """What was asked, token by token; a column is None where it was not given."""

    tokens: int
    units: list  # of ranges
    group_of_unit: list
    groups: int = 1
    columns: dict = field(default_factory=dict)
    center: list | None = None
    normalizer: float | None = None
    variance_coef: float = 0.5
    temperature: float = 1.0
    factor: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    log_ratio_clamp: float = 20.0
    clip_low: float = 0.0
    clip_high: float = 0.0
    dual_clip: float = math.inf
    ignore_index: int = -100
    vocabulary: int = 10
    first_word: int = 0
    words: int = 10
    all_words: int = 10  # of all shards: more than any word of a set
    mean_over_unit: bool = False
    count_kind: int = 0
    on_policy: bool = False
    sequence_level: bool = False
    policy_loss: str = "ratio"
    kl: str | None = None
    kl_unbiased: bool = False
    sets: list | None = None  # of words, one for each token; an empty one is the full vocabulary
    missing_full: bool = False


@dataclass
class Prepared:
    given: Given
    fields: dict  # name → one number per token
    supports: list  # of each token: the first of its words here, how many, how many in all
    activity: list
    counted: int
    factor: float
    fault: bool

    @property
    def denominator(self):
        return f32(self.counted * self.factor) or 1.0

    def valid(self, unit):
        return [i for i in unit if self.fields["label"][i] >= 0]


def prepare(given):
    """What the workspace must hold, to the bit: no number there is rounded more than once."""

    def value(name, i, otherwise):
        column = given.columns.get(name)
        return otherwise if column is None else column[i]

    result = Prepared(
        given, {name: [None] * given.tokens for name in FIELDS}, [(0, -1, 0)] * given.tokens,
        [None] * given.tokens, int(given.count_kind == 0), f32(given.factor), False,
    )  # fmt: skip
    if given.normalizer is not None:
        result.factor = f32(given.normalizer)
        if not result.factor >= 0:
            result.factor, result.fault = math.nan, True
    bad_sets = bool(given.sets) and (
        max(map(max, filter(None, given.sets)), default=-1) >= given.all_words
    )
    if bad_sets:
        result.factor, result.fault = math.nan, True
    for unit, group in zip(given.units, given.group_of_unit, strict=True):
        valid = {
            i
            for i in unit
            if value("mask", i, 1) != 0 and value("labels", i, 0) != given.ignore_index
        }
        if given.count_kind == 1:
            result.counted += len(valid)
        if given.count_kind == 2:
            result.counted += bool(valid)
        for i in unit:
            row = dict.fromkeys(FIELDS, 0.0) | {"label": -1, "temperature": 1.0}
            if i in valid:
                label = value("labels", i, given.first_word)
                row["label"] = label - given.first_word
                if not given.first_word <= label < given.first_word + given.words:
                    row["label"] = given.words
                label_in_range = 0 <= label < given.vocabulary
                found = True
                if given.sets is not None and label_in_range:
                    result.supports[i], found = support(given, i, label)
                    if bad_sets:
                        result.supports[i], found = (0, 0, 0), False
                    if not found:
                        row["label"] = given.words
                row["temperature"] = f32(value("temperature", i, given.temperature))
                row["variance_coef"] = f32(value("variance_coef", i, given.variance_coef))
                row["weight"] = f32(1 / len(valid)) if given.mean_over_unit else 1.0
                row["old_logps"] = f32(value("old_logps", i, 0.0))
                row["ref_logps"] = f32(value("ref_logps", i, 0.0))
                scale = f32(value("importance_weights", i, 1.0))
                row["advantages"] = f32(f32(value("advantages", i, 0.0)) * scale)
                known_group = 0 <= group < given.groups
                if given.center is not None and known_group:
                    row["center"] = f32(f32(given.center[group]) - 1)
                good = {
                    "label": label_in_range and found,
                    "temperature": row["temperature"] >= f32(1e-6),
                    "variance_coef": row["variance_coef"] >= 0,
                    "weight": known_group,
                }
                result.fault |= not all(good.values())
                row |= {name: math.nan for name, ok in good.items() if not ok and name != "label"}
                level = row["variance_coef"] == 0 or (given.on_policy and row["center"] == 0)
                still = row["advantages"] == 0 and level
                still = still and given.kl_coef == 0 == given.entropy_coef
                result.activity[i] = int(still or result.supports[i][2] == 1)
            else:
                result.activity[i] = 2
            for name, x in row.items():
                result.fields[name][i] = x
    return result


def support(given, i, label):
    """(the support of token i, whether its label is where it must be)."""
    words = given.sets[i]
    if not words or (label not in words and given.missing_full):
        return (0, -1, 0), True
    before = sum(len(s) for s in given.sets[:i])
    past = given.first_word + given.words
    lower, here = (
        sum(low <= word < high for word in words)
        for low, high in ((0, given.first_word), (given.first_word, past))
    )
    return (before + lower, here, len(words)), label in words


def _difference(a, b):
    """Eq. 2, and a bound of its error; a difference from an infinity is exact."""
    raw = 0.0 if a == b else a - b
    finite = math.isfinite(a) and math.isfinite(b)
    return raw, U * (abs(a) + abs(b)) if finite and a != b else 0.0


def _at_edge(raw, error, clamp):
    return abs(abs(raw) - clamp) <= error


def _clamp(x, clamp):
    return x if math.isnan(x) else max(-clamp, min(clamp, x))


@dataclass
class Ratio:
    raw: float
    error: float  # of raw, and of δ
    clamp: float

    def __post_init__(self):
        self.delta = _clamp(self.raw, self.clamp)
        self.ratio, self.d = math.exp(self.delta), math.expm1(self.delta)
        self.d_error = 2 * self.ratio * self.error + 8 * U * abs(self.d)
        self.clamped = abs(self.raw) > self.clamp
        self.at_edge = _at_edge(self.raw, self.error, self.clamp)


def ratios(p, logps):
    """{token: Ratio}"""
    given, result = p.given, {}
    for unit in map(p.valid, given.units):
        pairs = {
            i: _difference(logps[i], logps[i] if given.on_policy else p.fields["old_logps"][i])
            for i in unit
        }
        if given.sequence_level and unit:
            # Eq. 26.
            raw = sum(x for x, _ in pairs.values()) / len(unit)
            error = sum(x for _, x in pairs.values()) / len(unit)
            if math.isfinite(raw):
                error += 4 * U * abs(raw)
            pairs = dict.fromkeys(unit, (raw, error))
        result |= {i: Ratio(*pairs[i], given.log_ratio_clamp) for i in unit}
    return result


def _members(p):
    """[(group, valid tokens)], of each unit."""
    last = max(p.given.groups - 1, 0)
    return [
        (min(max(group, 0), last), p.valid(unit))
        for unit, group in zip(p.given.units, p.given.group_of_unit, strict=True)
    ]


def means(p, logps, upstream):
    """Eq. 9: ([μ - 1, then κ of each group], bounds)."""
    groups, of = p.given.groups, ratios(p, logps)
    mu, kappa = [(0.0, 0.0)] * groups, [(0.0, 0.0)] * groups
    members = defaultdict(list)
    for group, unit in _members(p):
        members[group] += unit
    for g, tokens in members.items():
        a = {i: p.fields["weight"][i] for i in tokens}
        weight = sum(a.values())
        if weight == 0:
            continue
        mean = sum(a[i] * of[i].d for i in tokens) / weight
        error = sum(a[i] * of[i].d_error for i in tokens) / weight + 8 * U * abs(mean)
        pull = {i: upstream[i] * a[i] * p.fields["variance_coef"][i] for i in tokens}
        mu[g] = mean, error
        kappa[g] = (
            sum(pull[i] * (of[i].d - mean) for i in tokens) / weight,
            sum(
                abs(pull[i]) * (of[i].d_error + 8 * U * (abs(of[i].d) + abs(mean)) + error)
                for i in tokens
            )
            / weight,
        )
    return [list(x) for x in zip(*mu, *kappa, strict=True)]


@dataclass
class Term:
    """Of the loss: its value and its derivatives in the log ratio and in the log-prob besides."""

    value: float = 0.0
    error: float = 0.0
    ratio_slope: float = 0.0
    ratio_slope_size: float = 0.0  # at most: an error of it is relative to this
    jump: float = 0.0  # what it changes by at an edge that is too near to tell the side
    logp_slope: float = 0.0
    logp_slope_error: float = 0.0
    # Of the clip: whether it binds, and whether that cannot be told.
    low: tuple[bool, bool] = (False, False)
    high: tuple[bool, bool] = (False, False)


def _policy(given, r, advantage, logp):
    """Eq. 5 and 21, P."""
    gains, loses = advantage > 0, advantage < 0
    # At ε the distance from one is told from it but for its own error and the rounding of ε.
    low, low_edge, high, high_edge = (
        x
        for sign, bound in ((-1, given.clip_low), (1, given.clip_high))
        for x in (sign * r.d > bound, abs(sign * r.d - bound) <= r.d_error + 2 * U * bound)
    )
    highest = 1 + given.clip_high
    if given.policy_loss == "ratio":
        low = low_edge = high = high_edge = False
    elif given.policy_loss == "clip":
        low, low_edge = low and loses, low_edge and loses
        if loses:
            highest = given.dual_clip
            high = r.ratio > highest
            high_edge = abs(r.ratio - highest) <= r.ratio * (2 * r.error + 8 * U)
        high, high_edge = high and (gains or loses), high_edge and (gains or loses)
    factor = 1 - given.clip_low if low else (highest if high else r.ratio)
    bound, edge = low or high, low_edge or high_edge
    # It is continuous: at an edge it is off by as much as ρ.
    error = abs(factor) * 8 * U + (0.0 if bound and not edge else 2 * r.ratio * r.error)
    value, size = -advantage * factor, abs(advantage)
    if given.policy_loss == "cispo":
        return Term(
            value * logp, size * error * abs(logp) + 8 * U * abs(value * logp), logp_slope=value,
            logp_slope_error=size * error, low=(low, low_edge), high=(high, high_edge),
        )  # fmt: skip
    slope_size = 0.0 if bound and not edge else size * r.ratio
    return Term(
        value, size * error, 0.0 if bound else value, slope_size, slope_size if edge else 0.0,
        low=(low, low_edge), high=(high, high_edge),
    )  # fmt: skip


def _kl(given, r, ref, logp):
    """Eq. 5, 6 and 23, m·KL."""
    (value, error), (slope, slope_error) = _kl_estimate(given.kl, ref, logp, given.log_ratio_clamp)
    # Without an estimator there is nothing that a NaN ratio would multiply.
    if given.kl is None or not given.kl_unbiased:
        return Term(value, error, logp_slope=slope, logp_slope_error=slope_error)
    ratio, relative = r.ratio, 2 * r.error + 8 * U
    error = ratio * (error + (abs(value) + error) * relative)
    slope_error = ratio * (slope_error + (abs(slope) + slope_error) * relative)
    # Its slope in the log ratio is its value.
    return Term(
        ratio * value, error, ratio * value, ratio * abs(value), logp_slope=ratio * slope,
        logp_slope_error=slope_error,
    )  # fmt: skip


def _kl_estimate(kind, ref, logp, clamp):
    """Eq. 6 and 23: (value, bound), (slope, bound)."""
    if kind is None:
        return (0.0, 0.0), (0.0, 0.0)
    raw, error = _difference(ref, logp)
    q = _clamp(raw, clamp)
    if kind == "k1":
        value, slope = (-q, error + 8 * U * abs(q)), (1.0, 8 * U)
    elif kind == "k2":
        bound = error + 8 * U * abs(q)
        value, slope = (q * q / 2, abs(q) * bound + error**2), (-q, bound)
    else:
        e = math.expm1(q)
        bound = 2 * math.exp(q) * error + 8 * U * abs(e)
        value = e - q, abs(e) * (error + 8 * U) + math.exp(q) * error + 8 * U * abs(q)
        slope = -e, bound
    if abs(raw) > clamp:
        slope = 0.0, 8 * U
    if _at_edge(raw, error, clamp):
        slope = slope[0], slope[1] + abs({"k1": 1.0, "k2": q, "k3": math.expm1(q)}[kind])
    return value, slope


def finish(p, logps, entropy, upstream, center):
    """{name: (values, bounds)}; `center` holds μ - 1 and κ of each group, or is None."""
    given, n = p.given, p.given.tokens
    of = ratios(p, logps)
    moments = [[[0.0, 0.0] for _ in range(given.groups)] for _ in range(3)]
    loss, dlogps, dentropy = ([[0.0, 0.0] for _ in range(n)] for _ in range(3))
    policies, penalties, kls, entropies, clips = [], [], [], [], []
    for group, unit in _members(p):
        ratio_parts = {}
        for i in unit:
            r, f = of[i], {name: column[i] for name, column in p.fields.items()}
            w, coef = f["weight"] / p.denominator, f["variance_coef"]
            c, kappa = (center[group], center[given.groups + group]) if center else (f["center"], 0)
            gap, reached = r.d - c, upstream[i] * w
            h = entropy[i] if entropy else 0.0
            penalty = coef * gap**2
            policy = _policy(given, r, f["advantages"], logps[i])
            kl = _kl(given, r, f["ref_logps"], logps[i])
            # As `value_bound` and `g_bound` of tolerance.py.
            gap_error = 8 * U * abs(c)
            penalty_error = 2 * coef * abs(gap) * r.ratio * (2 * r.error + 8 * U)
            penalty_error += coef * abs(gap) * (2 * gap_error + 8 * U * abs(gap))
            penalty_error += coef * (2 * r.ratio * r.error + gap_error) ** 2
            loss[i] = [
                w * (policy.value + penalty + given.kl_coef * kl.value - given.entropy_coef * h),
                w * (policy.error + penalty_error + abs(given.kl_coef) * kl.error)
                + w * abs(given.entropy_coef * h) * 8 * U,
            ]
            slope = policy.ratio_slope + 2 * coef * gap * r.ratio + given.kl_coef * kl.ratio_slope
            slope = reached * slope - 2 * w * r.ratio * kappa
            largest = policy.ratio_slope_size + 2 * coef * r.ratio * (r.ratio + abs(gap))
            largest += abs(given.kl_coef) * kl.ratio_slope_size
            largest = abs(reached) * largest + 2 * w * r.ratio * abs(kappa)
            error = largest * (2 * r.error + 8 * U)
            error += abs(reached) * (r.ratio * 2 * coef * gap_error + policy.jump)
            if given.kl_unbiased:
                error += abs(reached * given.kl_coef) * kl.error
            if r.clamped:
                slope, error = 0.0, 0.0
            ratio_parts[i] = slope, error + (largest if r.at_edge else 0.0)
            dlogps[i] = [
                reached * (policy.logp_slope + given.kl_coef * kl.logp_slope),
                abs(reached) * policy.logp_slope_error
                + abs(reached * given.kl_coef) * kl.logp_slope_error
                + 8 * U * abs(reached * policy.logp_slope),
            ]
            dentropy[i] = [-reached * given.entropy_coef, 8 * U * abs(reached * given.entropy_coef)]
            policies.append((w * policy.value, w * policy.error))
            penalties.append((w * penalty, w * penalty_error))
            kls.append((kl.value, kl.error))
            clips.append((policy.low, policy.high))
            entropies.append((h, 8 * U * abs(h)))
            a, d, e = f["weight"], r.d, r.d_error
            terms = (
                (a, 8 * U * a), (a * d, a * e),
                (a * d * d, a * (2 * abs(d) * e + e * e + 8 * U * d * d)),
            )  # fmt: skip
            for moment, term in zip(moments, terms, strict=True):
                moment[group] = [x + y for x, y in zip(moment[group], term, strict=True)]
        if given.sequence_level and unit:
            # Eq. 11.
            slope, error = (
                sum(x) / len(unit) for x in zip(*ratio_parts.values(), strict=True)
            )  # fmt: skip
            ratio_parts = dict.fromkeys(unit, (slope, error + 8 * U * abs(slope)))
        for i, part in ratio_parts.items():
            dlogps[i] = [x + y for x, y in zip(dlogps[i], part, strict=True)]
    total = [sum(x) for x in zip(*loss, strict=True)] or [0.0, 0.0]
    result = {
        "loss": [[x] for x in total],
        "losses": [list(x) for x in zip(*loss, strict=True)],
        "dlogps": [list(x) for x in zip(*dlogps, strict=True)],
        "dentropy": [list(x) for x in zip(*dentropy, strict=True)],
        "stats": [[pair[k] for moment in moments for pair in moment] for k in range(2)],
    }
    sizes = [p.supports[i][2] for i in of]
    metrics = _metrics(list(of.values()), policies, penalties, kls, entropies, sizes, clips)
    result["metrics"] = [list(x) for x in zip(*(metrics[name] for name in METRICS), strict=True)]
    return result


def _metrics(of, policies, penalties, kls, entropies, sizes, clips):
    count = max(len(of), 1)

    def total(pairs):
        return sum(x for x, _ in pairs), sum(x for _, x in pairs)

    def mean(pairs):
        x, error = total(pairs)
        return x / count, error / count

    m1, error = mean([(r.d, r.d_error) for r in of])
    m2, m2_error = mean([(r.d**2, 2 * abs(r.d) * r.d_error + r.d_error**2) for r in of])
    variance = m2 - m1 * m1
    variance = 0.0 if variance < 0 else variance
    # The last: float64 sums, and their difference.
    spread = m2_error + 2 * abs(m1) * error + error**2 + (count + 8) * 2.0**-53 * m2

    def ess(mean, variance):
        both = mean * mean + max(variance, 0.0)
        return 1.0 if both == 0 else mean * mean / both

    share = math.nan if math.isnan(m1) else ess(1 + m1, variance)
    corners = [
        ess(1 + m1 + i * error, variance + j * spread) for i in (-1, 1) for j in (-1, 1)
    ]  # fmt: skip
    d = [r.d for r in of] or [0.0]
    lost = any(map(math.isnan, d))
    widest = max((r.d_error for r in of), default=0.0)
    return {
        "ratio/mean": (1 + m1, error),
        "ratio/var": (variance, spread),
        "ratio/min": (math.nan if lost else 1 + min(d), widest),
        "ratio/max": (math.nan if lost else 1 + max(d), widest),
        "ratio/ess": (share, max(abs(x - share) for x in corners) + 2.0**-50),
        "ratio/clamped": mean([(r.clamped, r.at_edge) for r in of]),
        "kl/old": mean(
            [
                (r.d - r.delta, 2 * abs(r.d) * r.error + 8 * U * (abs(r.d) + abs(r.delta)))
                for r in of
            ]
        ),
        "loss/policy": total(policies),
        "loss/penalty": total(penalties),
        "kl/ref": mean(kls),
        "entropy": mean(entropies),
        "support/single": (sizes.count(1) / count, 0.0),
        "support/size": (sum(sizes) / max(len(sizes) - sizes.count(0), 1), 0.0),
        "clip/low": mean([low for low, _ in clips]),
        "clip/high": mean([high for _, high in clips]),
    }


def shard_parts(label, temperature, words, logp, top, log_total, entropy, whole_top):
    """Eq. 30 of one token, before the SUM."""
    log_part = log_total + (top - whole_top) / (LN_2 * temperature)
    part, here = 2.0**log_part, 0 <= label < words
    at_label = logp / LN_2 + log_part if here else 0.0
    if log_total == -math.inf and here:
        at_label = -math.inf
    mean = 0.0 if part == 0 else part * (log_part - entropy / LN_2)
    return part, at_label, float(here), float(label >= 0), mean


def shard_combine(label, ranks, total, at_label, owners, readers, mean):
    """Eq. 30 of one token, after it: (logp, log_total, entropy, whether the ranks are alike)."""
    log_total = math.log2(total)
    alike = (owners == 1 and readers == ranks) if label >= 0 else readers == 0
    if label < 0:
        return (0.0 if alike else math.nan), log_total, 0.0, alike
    logp = (at_label - log_total) * LN_2 if alike else math.nan
    return logp, log_total, (log_total - mean / total) * LN_2, alike
