"""The kernels over tokens of each backend, held to token_oracle.py.

What `prepare` writes is held to the bit, the rest to the bounds of docs/derivation.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import token_oracle as oracle
from support.strategies import SUPPORTS, sets_of
from support.tolerance import assert_within
from torch import Tensor

from r2vpo_kernels import SamplingMask, sampling
from r2vpo_kernels.backends import calls, registry
from r2vpo_kernels.backends.calls import NOTHING, Column, Prepare, Tokens
from r2vpo_kernels.checks import MissingLabel

# As in conftest.py; drawn calls do not see its fixture.
DEVICE = torch.device(os.environ.get("R2VPO_TEST_DEVICE", "cpu"))
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NAN = math.nan
NUMBERS = (
    "variance_coef", "temperature", "factor", "kl_coef", "entropy_coef", "log_ratio_clamp",
    "clip_low", "clip_high", "dual_clip",
)  # fmt: skip


@dataclass
class Call:
    """The arguments of `prepare`, the same for the oracle, and what the other kernels take."""

    prepare: Prepare
    given: oracle.Given
    logps: Tensor
    entropy: Tensor | None
    upstream: Column
    upstreams: list[float]

    @property
    def tokens(self) -> Tokens:
        return self.prepare.tokens


@dataclass
class Layout:
    """A partition of the tokens into units."""

    shape: tuple[int, ...]
    offsets: list[int]
    unit_length: int
    cu_seqlens: Tensor | None = None

    @staticmethod
    def padded(batch: int, length: int) -> Layout:
        return Layout((batch, length), [u * length for u in range(batch + 1)], length)

    @staticmethod
    def packed(lengths: list[int], dtype: torch.dtype = torch.int64) -> Layout:
        offsets = [0, *accumulate(lengths)]
        return Layout((offsets[-1],), offsets, 0, torch.tensor(offsets, dtype=dtype, device=DEVICE))

    @staticmethod
    def tiles(tokens: int, length: int) -> Layout:
        return Layout((tokens,), [*range(0, tokens, length), tokens], length)

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    @property
    def units(self) -> list[range]:
        return [range(*pair) for pair in zip(self.offsets, self.offsets[1:], strict=False)]


def filled(*shape: int) -> Tensor:
    return torch.full(shape, NAN, device=DEVICE)


def strided(x: Tensor) -> Tensor:
    """The values of x in every second place of a larger tensor, its dimensions in reverse."""
    memory = torch.full((*(2 * n for n in reversed(x.shape)),), 77, device=DEVICE).to(x.dtype)
    view = memory[(slice(None, None, 2),) * x.dim()].permute(*reversed(range(x.dim())))
    return view.copy_(x)


class Draw:
    """Tensors at random for a layout."""

    def __init__(self, layout: Layout, seed: int, views: bool) -> None:
        self.layout, self.views = layout, views
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def laid(self, x: Tensor) -> Tensor:
        return strided(x) if self.views and x.dim() else x.to(DEVICE)

    def values(self, kind: str, valid: Tensor | None = None) -> Tensor:
        """Of `kind`: one for each token (NaN where not valid), each unit, or all."""
        shapes = {"token": self.layout.shape, "unit": (len(self.layout.units),), "one": ()}
        x = self.normal(*shapes[kind])
        # Some are 0: where all is, the gradient is known to be 0.
        x = torch.where(self.normal(*x.shape) < 0.5, x, 0.0)
        return x if kind != "token" or valid is None else torch.where(valid, x, NAN)

    def spread(self, x: Tensor) -> list[Any]:
        """One number per token."""
        if x.dim() == 0:
            return [x.item()] * self.layout.tokens
        if x.shape == self.layout.shape:
            return x.reshape(-1).tolist()
        return [v for v, unit in zip(x.tolist(), self.layout.units, strict=True) for _ in unit]


def call(layout: Layout, seed: int = 0, views: bool = False, **options: Any) -> Call:
    """Data for `options`, which are described where they are drawn (`calls_of_every_kind`)."""
    get, draw = options.get, Draw(layout, seed, views)
    N, U, shape = layout.tokens, len(layout.units), torch.Size(layout.shape)
    tensors: dict[str, Tensor] = {}
    labels = draw.integers(0, 10, *shape)
    all_labels = labels.reshape(-1).tolist()
    valid = torch.ones(shape, dtype=torch.bool)
    if get("ignored"):
        valid &= draw.normal(*shape) < 0.3
        labels = torch.where(valid, labels, -100)
    if get("mask"):
        keep = draw.normal(*shape) < (-9 if get("all_masked") else 0.5)
        tensors["mask"] = keep.to(options["mask"])
        valid &= keep
        # What is masked is not looked at.
        labels = torch.where(keep, labels, 99)
    if get("labels", torch.int64):
        tensors["labels"] = labels.to(get("labels", torch.int64))
    else:
        valid = tensors["mask"] != 0 if get("mask") else torch.ones_like(valid)
    dtype = get("dtype", torch.float32)
    logps = -draw.values("token", valid).abs()
    exact = torch.where(valid, logps, -1.0)
    tensors["advantages"] = draw.values(get("advantages", "token"), valid).to(dtype)
    if not get("on_policy"):
        tensors["old_logps"] = (exact + 0.4 * draw.values("token", valid)).to(dtype)
    if get("kl"):
        tensors["ref_logps"] = (exact + 0.5 * draw.values("token", valid)).to(dtype)
    for name, low in ("variance_coef", 0.0), ("temperature", 0.5), ("importance_weights", 0.0):
        if get(name):
            tensors[name] = (draw.values(options[name], valid).abs() + low).to(dtype)
    if get("spoiled") and N:
        for name in ("old_logps", "ref_logps"):
            if name in tensors:
                tensors[name].view(-1)[draw.integers(0, N, 1)] = -math.inf
        logps.reshape(-1)[draw.integers(0, N, 2)] = torch.tensor(get("spoiled"))
    logps = logps.reshape(-1).to(DEVICE)
    entropy = None
    if get("entropy"):
        entropy = draw.values("token", valid).abs().reshape(-1).to(DEVICE)
    upstream = 2 * draw.values(get("upstream")) if get("upstream") else None

    groups, group_of_unit, ids, size = 1, [0] * U, None, 0
    if get("groups") in ("ids", "runs"):
        groups = 3
        runs = get("groups") == "runs"
        ids = torch.arange(U) * groups // max(U, 1) if runs else draw.integers(0, groups, U)
        group_of_unit = ids.tolist()
        ids = draw.laid(ids.to(get("group_dtype", torch.int64)))
    elif get("groups") == "size":
        size, groups = 2, max(1, -(-U // 2))
        group_of_unit = [u // 2 for u in range(U)]
    center = None
    if get("center") == "given":
        center = 1 + 0.3 * draw.normal(groups).to(DEVICE)
    numbers = {
        "variance_coef": 0.7, "temperature": 1.3, "factor": get("factor", 3.3),
        "kl_coef": 0.2 if get("kl") else 0.0, "entropy_coef": 0.1 if get("entropy") else 0.0,
        "log_ratio_clamp": get("clamp", 20.0), "clip_low": get("clip_range", (0.0, 0.0))[0],
        "clip_high": get("clip_range", (0.0, 0.0))[1], "dual_clip": get("dual_clip", math.inf),
    }  # fmt: skip
    numbers = {name: oracle.f32(x) for name, x in numbers.items()}
    normalizer = torch.tensor(5.5, device=DEVICE) if get("normalizer") else None

    tensors = {name: draw.laid(x) for name, x in tensors.items()}
    sampling_mask, sets = None, None
    if get("support"):
        # Of all words, those of another shard too.
        sets = sets_of(options["support"], all_labels, 10, draw.generator)
        sets = [words or [] for words in sets]
        missing_label: MissingLabel = "full" if options["support"] == "some missing" else "error"
        sampling_mask = SamplingMask.from_lists(sets, device=DEVICE, missing_label=missing_label)
    parts = min(max(U, 1), get("parts", 3))
    kl = get("kl")
    in_order = tuple(numbers[name] for name in NUMBERS)
    tokens = Tokens(
        filled(calls.workspace_size(N, U)), N, U, groups, parts,
        bool(get("on_policy")), bool(get("sequence_level")), get("policy_loss", "ratio"), kl,
        bool(get("kl_unbiased")), sampling_mask is not None,
    )  # fmt: skip
    columns = {name: calls.column(name, x, shape, DEVICE) for name, x in tensors.items()}
    common: dict[str, Any] = {
        "ignore_index": -100, "vocabulary": 10, "first_word": 2 if get("shard") else 0,
        "words": 5 if get("shard") else 10, "mean_over_unit": bool(get("mean_over_unit")),
        "count_kind": get("count_kind", 1),
    }  # fmt: skip
    if get("carried"):
        columns["logps"] = calls.column("logps", draw.laid(logps.view(shape)), shape, DEVICE)
        columns["entropy"] = columns["logps"]
    prepare = Prepare(
        tokens, **columns, **common, cu_seqlens=layout.cu_seqlens, group_ids=ids, center=center,
        normalizer=normalizer, unit_length=layout.unit_length, units_per_group=size,
        sampling_mask=sampling_mask, sampling_vocabulary=10,
        numbers=torch.tensor(in_order, device=DEVICE) if get("numbers_tensor") else in_order,
        activity=torch.full((N,), 9, dtype=torch.uint8, device=DEVICE),
    )  # fmt: skip
    if get("carried"):
        prepare.logps_out, prepare.entropy_out = filled(2, N).unbind()
    expected = oracle.Given(
        N, layout.units, group_of_unit, groups,
        {name: draw.spread(x) for name, x in tensors.items()},
        None if center is None else center.tolist(), 5.5 if get("normalizer") else None,
        **numbers, **common, on_policy=tokens.on_policy, sequence_level=tokens.sequence_level,
        policy_loss=tokens.policy_loss, kl=kl, kl_unbiased=tokens.kl_unbiased, sets=sets,
        missing_full=get("support") == "some missing",
    )  # fmt: skip
    if upstream is None:
        return Call(prepare, expected, logps, entropy, NOTHING, [1.0] * N)
    upstream = draw.laid(upstream)
    column = calls.column("upstream", upstream, shape, DEVICE)
    return Call(prepare, expected, logps, entropy, column, draw.spread(upstream))


@st.composite
def calls_of_every_kind(draw: st.DrawFn) -> Call:
    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    kind = pick("padded", "packed", "tiles", "tokens")
    lengths = draw(st.lists(st.integers(0, 5), max_size=5))
    if kind == "padded":
        layout = Layout.padded(len(lengths), max(lengths, default=0))
    elif kind == "packed":
        # With as many sequences as tokens each must have one.
        lengths = [1] * len(lengths) if len(lengths) == sum(lengths) else lengths
        layout = Layout.packed(lengths, pick(torch.int32, torch.int64))
    else:
        layout = Layout.tiles(sum(lengths), 3 if kind == "tiles" else 1)
    per = ("one", "token") if kind in ("tiles", "tokens") else ("one", "unit", "token")
    options = {
        "labels": pick(torch.int64, torch.int32, torch.int16, torch.int8, None),
        "ignored": pick(False, True),  # whether some labels are ignore_index
        "mask": pick(None, torch.bool, *INTEGERS, *FLOATS),
        "all_masked": pick(False, False, True),
        "dtype": pick(*FLOATS),  # of what is per token
        "advantages": pick(*per),
        "variance_coef": pick(None, *per),  # None: a number
        "temperature": pick(None, *per),
        "importance_weights": pick(None, *per),
        "on_policy": pick(False, False, True),
        "policy_loss": pick("ratio", "clip", "cispo"),
        "clip_range": pick((0.2, 0.3), (1.0, 4.0)),
        "dual_clip": pick(math.inf, 1.5),
        "kl": pick(None, "k1", "k2", "k3"),
        "kl_unbiased": pick(False, True),
        "entropy": pick(False, True),
        "groups": "ids" if kind == "tokens" else pick(None, "ids", "size"),
        "group_dtype": pick(*INTEGERS),
        "center": pick(None, "given", "empirical"),
        "sequence_level": kind in ("padded", "packed") and pick(False, True),
        "mean_over_unit": kind in ("padded", "packed") and pick(False, True),
        "count_kind": pick(0, 1, 2),
        "normalizer": False,
        "upstream": pick(None, "one", "token"),
        "spoiled": pick(None, None, [NAN, -math.inf], [-math.inf, -math.inf]),
        "clamp": pick(20.0, 0.3),
        "numbers_tensor": pick(False, True),
        "parts": pick(1, 3),
        "shard": pick(False, True),
        "support": pick(None, *SUPPORTS[1:]),
        "carried": pick(False, True),  # whether log-probs and entropy came with the call
    }
    if options["labels"] is None:
        options["support"] = None
    if options["count_kind"] == 0:
        options["normalizer"] = pick(False, True)
    return call(layout, draw(st.integers(0, 2**16)), pick(False, True), **options)


def same_bits(a: Tensor, b: Tensor | list[float]) -> bool:
    b = torch.as_tensor(b, dtype=a.dtype, device=a.device)
    return torch.equal(a.isnan(), b.isnan()) and bool(((a == b) | a.isnan()).all())


def integers(t: Tokens, begin: int, count: int) -> Tensor:
    return t.workspace[begin : begin + count].view(torch.int32)


def faults(t: Tokens) -> bool:
    return bool(t.workspace[calls.FAULTS : calls.FAULTS + t.parts].any())


def check_prepare(backend: Any, c: Call) -> oracle.Prepared:
    expected, t = oracle.prepare(c.given), c.tokens
    backend.prepare(c.prepare)
    fields = dict(expected.fields)
    assert t.labels.tolist() == fields.pop("label")
    for k, (name, column) in enumerate(fields.items(), 1):
        assert same_bits(t.row(k), column), name
    if c.given.sets is not None:
        assert t.supports.T.tolist() == [list(x) for x in expected.supports]
    assert c.prepare.activity is not None and c.prepare.activity.tolist() == expected.activity
    assert integers(t, calls.COUNTS, t.parts).sum() == expected.counted
    assert faults(t) == expected.fault
    assert not integers(t, calls.TICKETS, 3).any()
    first, last = ("log_ratio_clamp", "kl_coef", "entropy_coef"), NUMBERS[-3:]
    given = [getattr(c.given, name) for name in (*first, *last)]
    assert same_bits(t.workspace[:7], [*given[:3], expected.factor, *given[3:]])
    spans = integers(t, calls.HEADER + calls.ROWS * t.tokens, calls.UNIT_ROWS * t.units)
    begins, ends, groups = spans.view(calls.UNIT_ROWS, -1).tolist() if t.units else ([], [], [])
    assert [range(*x) for x in zip(begins, ends, strict=True)] == c.given.units
    last = max(c.given.groups - 1, 0)
    assert groups == [min(max(g, 0), last) for g in c.given.group_of_unit]
    for out in c.prepare.logps_out, c.prepare.entropy_out:
        if out is not None:
            assert same_bits(out, torch.where(t.labels >= 0, c.logps, 0.0))
    return expected


def check(name: str, actual: Tensor, expected: list[list[float]]) -> None:
    if actual.numel():
        assert_within(name, actual.cpu(), *(torch.tensor(x, dtype=torch.float64) for x in expected))


def run_means(backend: Any, c: Call) -> Tensor:
    found = filled(2, c.given.groups)
    backend.means(c.tokens, c.logps, c.upstream, found)
    return found


def run_finish(
    backend: Any, c: Call, means: Tensor | None, per_token: bool, slopes: bool = True
) -> dict[str, Tensor]:
    n = c.given.tokens
    out = {
        "losses" if per_token else "loss": filled(n) if per_token else filled(),
        "stats": filled(3, c.given.groups),
        "metrics": filled(len(oracle.METRICS)),
    }
    loss, stats, metrics = out.values()
    if slopes:
        out |= {"dlogps": filled(n), "dentropy": filled(n)}
    backend.finish(
        c.tokens, c.logps, c.entropy, c.upstream, means, loss, stats, metrics, out.get("dlogps"),
        out.get("dentropy"),
    )  # fmt: skip
    return out


def check_copies(backend: Any, c: Call, means: Tensor | None) -> None:
    loss, stats, metrics = filled(), filled(3, c.given.groups), filled(len(oracle.METRICS))
    copies = filled(c.given.tokens), None if c.entropy is None else filled(c.given.tokens)
    backend.finish(
        c.tokens, c.logps, c.entropy, c.upstream, means, loss, stats, metrics, None, None, *copies
    )
    for copy, original in zip(copies, (c.logps, c.entropy), strict=True):
        if copy is not None:
            assert same_bits(copy, torch.where(c.tokens.labels >= 0, original, 0.0))


def check_call(backend: Any, c: Call, empirical: bool = False) -> None:
    prepared = check_prepare(backend, c)
    logps = c.logps.tolist()
    means = None
    if empirical:
        # What is rounded here is given to `finish` and to the oracle alike.
        means = run_means(backend, c)
        expected = oracle.means(prepared, logps, c.upstreams)
        check("means", means, expected)
    entropy = None if c.entropy is None else c.entropy.tolist()
    center = None if means is None else means.reshape(-1).tolist()
    expected = oracle.finish(prepared, logps, entropy, c.upstreams, center)
    for per_token in False, True:
        for name, actual in run_finish(backend, c, means, per_token).items():
            check(name, actual, expected[name])
            if name == "metrics":
                assert not actual[1] < 0  # the variance
    check_copies(backend, c, means)
    assert not integers(c.tokens, calls.TICKETS, 3).any()


@pytest.fixture(scope="module")
def backend(kernels: str) -> Any:
    return registry.load(kernels)


@given(calls_of_every_kind(), st.booleans())
def test_tokens_of_every_kind(backend, c, empirical):
    check_call(backend, c, empirical)


@pytest.mark.parametrize("kl", [None, "k3"])
def test_a_nan_ratio_reaches_a_kl_that_there_is(backend, kl):
    check_call(backend, call(Layout.padded(1, 3), kl=kl, kl_unbiased=True, spoiled=[NAN, NAN]))


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("empirical", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout.tiles(2500, 1024), Layout.padded(1, 700), Layout.packed([0, 300, 0, 1, 200, 0])],
    ids=["tiles", "one sequence", "uneven"],
)
def test_units_of_many_tokens(backend, layout, empirical):
    check_call(backend, call(layout, mask=torch.bool, kl="k3"), empirical)
    if layout.unit_length != 1024:
        c = call(layout, mask=torch.bool, sequence_level=True, mean_over_unit=True)
        check_call(backend, c, empirical)


MANY_UNITS = {
    "ids": Layout.tiles(300, 1),
    "size": Layout.padded(600, 1),
    "runs": Layout.padded(1800, 1),  # Triton's tiles of 512 have one group or two
}


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("groups", MANY_UNITS)
def test_many_units_and_groups(backend, groups):
    layout = MANY_UNITS[groups]
    for empirical in False, True:
        check_call(backend, call(layout, groups=groups, variance_coef="token"), empirical)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[64000], [1] * 64000], ids=["one sequence", "one token each"])
def test_64000_tokens(backend, kernels, lengths):
    if kernels == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter would take minutes")
    c = call(Layout.packed(lengths), mask=torch.bool, groups="size", parts=512)
    check_call(backend, c, empirical=True)


@pytest.mark.parametrize("options", [{}, {"groups": "size"}, {"sequence_level": True}])
@pytest.mark.parametrize("layout", [Layout.padded(3, 0), Layout.padded(0, 3), Layout.packed([])])
def test_no_tokens(backend, layout, options):
    for empirical in False, True:
        c = call(layout, kl="k3", entropy=True, **options)
        check_call(backend, c, empirical)
        out = run_finish(backend, c, None, per_token=False)
        assert out["loss"] == 0 and not out["stats"].any()
        assert out["metrics"].tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, *[0.0] * 10]


BAD = {
    "label": ("labels", [10, -1, 2**62, -(2**62)]),
    "temperature": ("temperature", [0.0, 9e-7, -1.0, NAN]),
    "variance_coef": ("variance_coef", [-0.1, NAN]),
}


@pytest.mark.parametrize("where", BAD)
def test_a_bad_value_per_token_is_a_fault_and_nan(backend, where):
    name, values = BAD[where]
    for value in values:
        c = call(Layout.padded(2, 3), mask=torch.bool, temperature="token", variance_coef="token")
        column = getattr(c.prepare, name).tensor
        good = c.prepare.mask.tensor != 0
        column[~good] = value
        c.given.columns[name] = column.reshape(-1).tolist()
        check_call(backend, c)  # what is masked may be anything
        place = tuple(good.nonzero()[0])
        column[place] = value
        c.given.columns[name] = column.reshape(-1).tolist()
        assert check_prepare(backend, c).fault
        if where == "variance_coef":
            assert run_finish(backend, c, None, False)["loss"].isnan()


@pytest.mark.parametrize("value", [-1, 3, 2**62, -(2**62)])
def test_a_bad_group_is_a_fault_and_nan(backend, value):
    c = call(Layout.padded(3, 2), groups="ids", center="given")
    assert c.prepare.group_ids is not None
    c.prepare.group_ids[1] = c.given.group_of_unit[1] = value
    check_call(backend, c)
    check_call(backend, c, empirical=True)
    assert oracle.prepare(c.given).fault and run_finish(backend, c, None, False)["loss"].isnan()


@pytest.mark.parametrize("value", [-1.0, NAN])
def test_a_bad_normalizer_is_a_fault_and_nan(backend, value):
    c = call(Layout.padded(2, 3), count_kind=0, normalizer=True)
    assert c.prepare.normalizer is not None
    c.prepare.normalizer.fill_(value)
    c.given.normalizer = value
    check_call(backend, c)
    assert oracle.prepare(c.given).fault and run_finish(backend, c, None, False)["loss"].isnan()


@pytest.mark.parametrize(
    "offsets",
    [
        [1, 3, 6], [0, 3, 5], [0, 3, 7], [0, 7, 6], [0, -1, 6], [2**62, -(2**62), 6],
        [0, 1, 2, 2, 4, 5, 6],
    ],
)  # fmt: skip
def test_bad_offsets_are_a_fault_and_nan(backend, offsets):
    lengths = [1] * 6 if len(offsets) == 7 else [3, 3]
    c = call(Layout.packed(lengths), sequence_level=True)
    assert c.prepare.cu_seqlens is not None
    c.prepare.cu_seqlens.copy_(torch.tensor(offsets))
    c.tokens.labels.fill_(-7)
    backend.prepare(c.prepare)
    # Each is in some unit: what the row kernels read of it is written.
    assert (c.tokens.labels != -7).all()
    assert faults(c.tokens)
    assert c.tokens.workspace[3].isnan()
    assert run_finish(backend, c, run_means(backend, c), False)["loss"].isnan()


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("kind", SUPPORTS[1:])
def test_sets_of_every_kind(backend, kind, shard):
    """Many at once: with none, one, some or all of their words here, or of the full vocabulary."""
    c = call(Layout.padded(8, 8), support=kind, shard=shard, mask=torch.bool, kl="k3")
    check_call(backend, c)
    _, count, size = c.tokens.supports.tolist()
    assert -1 in count and all((n < 0) == (m == 0) for n, m in zip(count, size, strict=True))
    if shard and kind == "single":
        assert 0 in count
    elif shard and kind != "all words":
        # One here, of several: it is not certain.
        assert any(n == 1 < m for n, m in zip(count, size, strict=True))


@pytest.mark.parametrize("shard", [False, True])
def test_a_label_outside_of_its_set_is_a_fault_and_nan(backend, shard):
    c = call(Layout.padded(2, 3), support="small", mask=torch.bool, shard=shard)
    column, good = c.prepare.labels.tensor, c.prepare.mask.tensor != 0
    assert c.given.sets is not None and column is not None
    place = tuple(good.nonzero()[0])
    words = c.given.sets[place[0] * 3 + place[1]]
    column[place] = next(word for word in range(3, 10) if word not in words)
    c.given.columns["labels"] = column.reshape(-1).tolist()
    expected = check_prepare(backend, c)
    assert expected.fault and c.tokens.labels.view(2, 3)[place] == c.given.words


@pytest.mark.parametrize("word", [10, 2**31, 2**40])
def test_a_word_that_there_is_not_is_a_fault_and_nan(backend, word):
    """Wherever it stands, of a masked token too."""
    c = call(Layout.padded(2, 3), support="small", mask=torch.bool, all_masked=True)
    mask = c.prepare.sampling_mask
    assert c.given.sets is not None and mask is not None
    sets = [[*c.given.sets[0], word], *c.given.sets[1:]]
    c.given.sets, c.prepare.sampling_mask = sets, SamplingMask.from_lists(sets, device=DEVICE)
    assert check_prepare(backend, c).fault and c.tokens.workspace[3].isnan()
    # Of all shards there are more words than of these.
    c.prepare.sampling_vocabulary = c.given.all_words = 2**41
    check_call(backend, c)
    assert not oracle.prepare(c.given).fault


def test_sets_that_are_wrong_are_a_fault_and_reach_no_memory(backend, monkeypatch):
    """As on a GPU, where nobody looks when a mask is made."""
    monkeypatch.setattr(sampling, "may_synchronise", lambda value: False)
    ids = torch.tensor([4, -1, 4, 4, 2**40, 3], device=DEVICE)
    c = call(Layout.padded(1, 3), support="small")
    for offsets in [0, 2, 3, 6], [0, 4, 2, 6], [-9, 2, 99, 6], [1, 2, 3, 6], [0, 2, 3, 5]:
        c.prepare.sampling_mask = SamplingMask(ids, torch.tensor(offsets, device=DEVICE))
        backend.prepare(c.prepare)
        assert faults(c.tokens) and c.tokens.workspace[3].isnan()
        begin, count, size = c.tokens.supports
        assert (begin >= 0).all() and (begin + count <= len(ids)).all() and (count <= size).all()
        assert run_finish(backend, c, None, False)["loss"].isnan()


@pytest.mark.parametrize("center", [None, "given"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_activity_of_tokens(backend, on_policy, center):
    layout = Layout.padded(8, 8)
    c = call(layout, on_policy=on_policy, center=center, variance_coef="token", mask=torch.bool)
    assert set(check_prepare(backend, c).activity) == {0, 1, 2}


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mask_is_valid_where_it_is_not_zero(backend, dtype):
    """A NaN is valid, and so is a number too small for float32."""
    c = call(Layout.padded(1, 4), mask=dtype)
    values = torch.tensor([0.0, -0.0, NAN, torch.finfo(dtype).tiny], dtype=dtype)
    c.prepare.mask.tensor.copy_(values)
    c.prepare.labels.tensor.fill_(1)
    backend.prepare(c.prepare)
    assert c.tokens.labels.tolist() == [-1, -1, 1, 1]


def test_a_second_run_gives_the_same_bits(backend):
    layout = Layout.packed([5, 0, 70, 1, 33, 150])
    options: dict[str, Any] = {"groups": "ids", "kl": "k2", "mask": torch.int8, "parts": 4}
    results = []
    for _ in range(2):
        c = call(layout, **options)
        backend.prepare(c.prepare)
        means = run_means(backend, c)
        results.append([c.tokens.workspace, means, *run_finish(backend, c, means, False).values()])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads are the C++ backend's")
def test_the_number_of_threads_changes_no_bit():
    backend, before, results = registry.load("cpp"), torch.get_num_threads(), []
    c = call(Layout.packed([3000, 0, 2500, 9000, 1, 7000]), groups="size", variance_coef="token")
    try:
        for threads in 1, 2, 3:
            torch.set_num_threads(threads)
            backend.prepare(c.prepare)
            means = run_means(backend, c)
            workspace = c.tokens.workspace.clone()
            results.append([workspace, means, *run_finish(backend, c, means, False).values()])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


def test_slopes_that_are_not_wanted_change_nothing(backend):
    c = call(Layout.padded(3, 5), kl="k1", entropy=True)
    backend.prepare(c.prepare)
    without, all_of_it = (run_finish(backend, c, None, False, slopes) for slopes in (False, True))
    assert all(same_bits(x, all_of_it[name]) for name, x in without.items())


@pytest.mark.parametrize("with_entropy", [False, True])
def test_shards(backend, with_entropy):
    """Eq. 30, and what is not alike on all ranks."""
    words, ranks = 5, 2
    labels = [-1, 0, 4, words, 2, -1, words, 1]
    c = call(Layout.padded(1, len(labels)), temperature="token")
    backend.prepare(c.prepare)
    c.tokens.labels.copy_(torch.tensor(labels))
    torch.manual_seed(0)
    n = len(labels)
    entropy, log_total, whole_top = torch.rand(3, n).to(DEVICE).unbind()
    logps, top = -3 * torch.rand(n).to(DEVICE), torch.randn(n).to(DEVICE)
    log_total[4] = -math.inf  # a shard of -inf alone
    logps[4] = NAN
    entropy[4] = NAN
    whole_top = top + whole_top * (torch.arange(n, device=DEVICE) % 2)
    rows = 5 if with_entropy else 4
    given_entropy = entropy if with_entropy else None
    parts = filled(rows, n).double()
    backend.shard_parts(c.tokens, words, logps, top, log_total, given_entropy, whole_top, parts)
    columns = (c.tokens.row(1), logps, top, log_total, entropy, whole_top)
    for i, (label, temperature, *found) in enumerate(
        zip(labels, *(x.tolist() for x in columns), strict=True)
    ):
        logp, its_top, its_total, its_entropy, its_whole_top = found
        expected = oracle.shard_parts(
            label, temperature, words, logp, its_top, its_total, its_entropy, its_whole_top
        )
        for actual, x in zip(parts[:, i].tolist(), expected, strict=False):
            # exp2 and a few roundings of float64, of numbers below 2^5.
            assert actual == x or math.isclose(actual, x, rel_tol=2.0**-45, abs_tol=2.0**-45)

    other = torch.rand(rows, n, dtype=torch.float64).to(DEVICE)
    alike = torch.tensor([True, True, True, True, True, False, False, False])
    other[2] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    other[3] = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    for several in True, False:
        total = parts + other
        if not several:
            total[2:4, 5:] = torch.tensor([[0.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
            alike = torch.ones(n, dtype=torch.bool)
        backend.shard_combine(c.tokens, total, ranks, logps, log_total, given_entropy)
        expected = [
            oracle.shard_combine(label, ranks, *x, *([] if with_entropy else [0.0]))
            for label, x in zip(labels, total.T.tolist(), strict=True)
        ]
        assert alike.tolist() == [x[3] for x in expected]
        actual = (logps, log_total, entropy)
        for k in range(3 if with_entropy else 2):
            truth = torch.tensor([x[k] for x in expected], dtype=torch.float64)
            assert_within("shards", actual[k].cpu(), truth, 2.0**-45 * (1 + truth.abs()))
        assert bool(integers(c.tokens, calls.SHARD_FAULT, 1)) == several
        integers(c.tokens, calls.SHARD_FAULT, 1).zero_()
