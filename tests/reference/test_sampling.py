"""SamplingMask: what it is made of, its parts, and input that is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_kernels import SamplingMask, checks, ops, r2vpo_loss, sampling, token_logps

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SETS = [[5, 2, 9], [], [7], [0, 1], [], [3]]
NUMBERS = st.lists(st.one_of(st.none(), st.lists(st.integers(0, 100), unique=True)), max_size=9)


def sets_in(mask):
    ids, ends = mask.token_ids.tolist(), mask.offsets.tolist()
    assert mask.token_ids.dtype == torch.int32 and mask.offsets.dtype == torch.int64
    assert ends[0] == 0 and ends[-1] == len(ids) and len(ends) == len(mask) + 1
    return [ids[begin:end] for begin, end in itertools.pairwise(ends)]


def csr(sets):
    flat = torch.tensor([word for words in sets for word in words], dtype=torch.int64)
    ends = torch.tensor([0, *(len(words) for words in sets)]).cumsum(0)
    return flat, ends


def padded(sets, pad, width=4):
    rows = [[*words, *[pad] * (width - len(words))] for words in sets]
    return torch.tensor(rows, dtype=torch.int64)


@given(NUMBERS)
def test_every_constructor_makes_the_same(sets):
    lists = [words or [] for words in sets]
    expected = [sorted(words) for words in lists]
    flat, ends = csr(lists)
    sizes = ends.diff()
    width = max(map(len, lists), default=0)
    rows = padded(lists, -1, width).reshape(len(lists), width)
    for mask in (
        SamplingMask(flat, ends),
        SamplingMask.from_lists(sets),
        SamplingMask.from_counts(flat, sizes),
        SamplingMask.from_padded(rows),
        SamplingMask.from_padded(rows.where(rows >= 0, 101), pad=101),
        # What stands beyond the sizes may be anything, but not a fraction.
        SamplingMask.from_padded(rows, sizes=sizes),
        SamplingMask.from_padded(rows[None], sizes=sizes[None]),
    ):
        assert sets_in(mask) == expected and mask.missing_label == "error"
        assert mask.largest.item() == max((max(x) for x in expected if x), default=-1)
        assert mask.token_of().tolist() == [i for i, x in enumerate(expected) for _ in x]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_every_width(dtype):
    flat, ends = csr(SETS)
    rows = padded(SETS, 77)
    expected = [sorted(words) for words in SETS]
    for mask in (
        SamplingMask(flat.to(dtype), ends.to(dtype)),
        SamplingMask.from_counts(flat.to(dtype), ends.diff().to(dtype)),
        SamplingMask.from_padded(rows.to(dtype), pad=77),
        SamplingMask.from_padded(rows.to(dtype), sizes=ends.diff().to(dtype)),
    ):
        assert sets_in(mask) == expected
        assert sets_in(mask[torch.tensor([2, 0], dtype=dtype)]) == [[7], [2, 5, 9]]
    if dtype == torch.uint8:
        # Nothing there is -1.
        rows = torch.tensor([[255, 1]], dtype=dtype)
        assert sets_in(SamplingMask.from_padded(rows)) == [[1, 255]]


def test_what_lies_in_another_order_in_memory():
    flat, ends = csr(SETS)
    every_second = (torch.stack([x, x + 1], -1)[:, 0] for x in (flat, ends))
    assert sets_in(SamplingMask(*every_second)) == [sorted(words) for words in SETS]
    rows = padded(SETS, -1).t().contiguous().t()
    assert sets_in(SamplingMask.from_padded(rows)) == [sorted(words) for words in SETS]


def test_rows_of_sequences_are_in_the_order_of_labels():
    rows = padded(SETS, -1).view(2, 3, 4)
    assert sets_in(SamplingMask.from_padded(rows)) == [sorted(words) for words in SETS]
    sizes = torch.tensor([[3, 0, 1], [2, 0, 1]])
    mask = SamplingMask.from_padded(rows, sizes=sizes)
    assert sets_in(mask) == [sorted(words) for words in SETS]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamplingMask(torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)),
        lambda: SamplingMask.from_lists([]),
        lambda: SamplingMask.from_padded(torch.zeros(0, 3, dtype=torch.long)),
        lambda: SamplingMask.from_padded(torch.zeros(2, 0, 3, dtype=torch.long)),
        lambda: SamplingMask.from_lists(SETS)[3:3],
        lambda: SamplingMask.from_lists(SETS)[torch.zeros(0, dtype=torch.long)],
    ],
)
def test_of_no_token(make, backend, device):
    mask = make()
    assert len(mask) == 0 and sets_in(mask) == []
    logits, labels = torch.zeros(0, 10, device=device), torch.zeros(0, dtype=torch.long)
    token_logps(logits, labels.to(device), sampling_mask=mask.to(device), backend=backend)


def test_of_no_id(backend, device):
    """Every token has the full vocabulary, to the bit."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, device=device), torch.tensor([0, 3, 6], device=device)
    expected = token_logps(logits, labels, backend=backend)
    for mask in (
        SamplingMask.from_lists([[], None, []]),
        SamplingMask.from_padded(torch.full((3, 2), -1)),
        SamplingMask.from_padded(torch.zeros(3, 0, dtype=torch.long)),
        SamplingMask(torch.zeros(0, dtype=torch.long), torch.zeros(4, dtype=torch.long)),
    ):
        assert sets_in(mask) == [[], [], []] and mask.largest == -1
        found = token_logps(logits, labels, sampling_mask=mask.to(device), backend=backend)
        assert torch.equal(found, expected)


@given(NUMBERS, st.data())
def test_parts_are_those_of_a_list(sets, data):
    mask, expected = SamplingMask.from_lists(sets), [sorted(words or []) for words in sets]
    bounds = st.one_of(st.none(), st.integers(-12, 12))
    part = slice(data.draw(bounds), data.draw(bounds))
    assert sets_in(mask[part]) == expected[part] and len(mask[part]) == len(expected[part])
    again = slice(data.draw(bounds), data.draw(bounds))
    assert sets_in(mask[part][again]) == expected[part][again]
    if sets:
        index = data.draw(st.lists(st.integers(-len(sets), len(sets) - 1)))
        some = mask[torch.tensor(index, dtype=torch.int64)]
        assert sets_in(some) == [expected[i] for i in index]
        assert some.largest == max((word for i in index for word in expected[i]), default=-1)
        chosen = torch.tensor(index, dtype=torch.int64).unique() % max(len(sets), 1)
        by_mask = torch.zeros(len(sets), dtype=torch.bool).index_fill(0, chosen, True)
        assert sets_in(mask[by_mask]) == [
            x for x, is_in in zip(expected, by_mask, strict=True) if is_in
        ]
        joined = SamplingMask.cat([mask, some, mask[part]])
        assert sets_in(joined) == sets_in(mask) + sets_in(some) + sets_in(mask[part])


def test_what_it_says_of_itself_and_where_it_goes(device):
    mask = SamplingMask.from_lists(SETS, missing_label="full")
    assert repr(mask) == "SamplingMask(7 ids for 6 tokens, missing_label='full')"
    assert len(mask) == 6 and len(mask[1:4]) == 3
    moved = mask.to(device)
    assert moved.offsets.device.type == device.type and sets_in(moved) == sets_in(mask)
    away = mask.to("meta")
    assert all(x.is_meta for x in away.tensors()) and len(away) == 6
    for part in (moved, away, mask[1:3], mask[torch.tensor([4, 0])]):
        assert part.missing_label == "full"
    with pytest.raises(AttributeError):
        mask.sets = SETS


def test_what_it_was_made_of_may_be_changed(device):
    flat, ends = csr(SETS)
    given_ = flat.int().to(device), ends.to(device)
    mask = SamplingMask(*given_)
    for tensor in given_:
        tensor.fill_(0)
    assert sets_in(mask) == [sorted(words) for words in SETS]


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


ELSEWHERE = torch.zeros(2, dtype=torch.int64, device="meta")
SQUARE = torch.zeros(2, 2, dtype=torch.int64)
BAD = {
    # name: (what makes it, the argument named, words of the message)
    "ids not a tensor": (lambda: SamplingMask([1], integers(0, 1)), "token_ids", "list.*tensor"),
    "ids of floats": (
        lambda: SamplingMask(torch.ones(1), integers(0, 1)), "token_ids", "float32.*integers"
    ),
    "ids of bools": (
        lambda: SamplingMask(torch.ones(1).bool(), integers(0, 1)), "token_ids", "bool.*integers"
    ),
    "ids of two dimensions": (
        lambda: SamplingMask(SQUARE, integers(0, 1)), "token_ids", r"\(2, 2\).*one dimension"
    ),
    "sparse ids": (
        lambda: SamplingMask(integers(1).to_sparse(), integers(0, 1)), "token_ids", "sparse.*dense"
    ),
    "a negative id": (
        lambda: SamplingMask(integers(3, -2), integers(0, 2)), "token_ids", "-2.*at least 0"
    ),
    "an id twice": (
        lambda: SamplingMask(integers(4, 4, 5, 4), integers(0, 1, 4)), "token_ids",
        "4 twice in the set of token 1.*each id once",
    ),
    "offsets not a tensor": (lambda: SamplingMask(integers(1), [0, 1]), "offsets", "list.*tensor"),
    "offsets of floats": (
        lambda: SamplingMask(integers(1), torch.tensor([0.0, 1.0])), "offsets", "float32.*integers"
    ),
    "offsets of two dimensions": (
        lambda: SamplingMask(integers(1), SQUARE), "offsets", r"\(2, 2\).*one dimension"
    ),
    "offsets that fall": (
        lambda: SamplingMask(integers(1, 2), integers(0, 2, 1, 2)), "offsets",
        r"\[0, 2, 1, 2\].*rise from 0 to 2",
    ),
    "offsets that begin late": (
        lambda: SamplingMask(integers(1, 2), integers(1, 2)), "offsets", r"\[1, 2\].*from 0 to 2"
    ),
    "offsets that begin before the ids": (
        lambda: SamplingMask(integers(1, 2), integers(-1, 2)), "offsets", r"\[-1, 2\].*from 0 to 2"
    ),
    "offsets that end early": (
        lambda: SamplingMask(integers(1, 2), integers(0, 1)), "offsets", r"\[0, 1\].*from 0 to 2"
    ),
    "offsets that end past the ids": (
        lambda: SamplingMask(integers(1, 2), integers(0, 3)), "offsets", r"\[0, 3\].*from 0 to 2"
    ),
    "an offset of no token": (
        lambda: SamplingMask(integers(), integers(3)), "offsets", r"\[3\].*from 0 to 0"
    ),
    "no offsets": (lambda: SamplingMask(integers(), integers()), "offsets", r"\(0,\).*tokens \+ 1"),
    "no offsets for ids": (
        lambda: SamplingMask(integers(1), integers(0)), "offsets", r"\(1,\).*tokens \+ 1.*1 ids"
    ),
    "offsets on another device": (
        lambda: SamplingMask(integers(1), ELSEWHERE), "offsets", "meta.*cpu"
    ),
    "an unknown choice": (
        lambda: SamplingMask(integers(1), integers(0, 1), missing_label="drop"), "missing_label",
        "'drop'.*'error', 'full'",
    ),
    "an unhashable choice": (
        lambda: SamplingMask.from_lists([[1]], missing_label=["full"]), "missing_label", "full"
    ),
    "lists that are numbers": (lambda: SamplingMask.from_lists([[1], 2]), "sets", "int.*a list"),
    "lists that are a number": (lambda: SamplingMask.from_lists(2), "sets", "int.*a list of ids"),
    "lists of words": (lambda: SamplingMask.from_lists([["a"]]), "sets", "str.*a list of ids"),
    "lists of large numbers": (lambda: SamplingMask.from_lists([[2**70]]), "sets", "a list of ids"),
    "lists of lists": (lambda: SamplingMask.from_lists([[[1]]]), "token_ids", "one dimension"),
    "lists of floats": (lambda: SamplingMask.from_lists([[0.5]]), "token_ids", "float32.*integers"),
    "counts of floats": (
        lambda: SamplingMask.from_counts(integers(1), torch.ones(1)), "counts", "float32.*integers"
    ),
    "counts of two dimensions": (
        lambda: SamplingMask.from_counts(integers(1), SQUARE), "counts", r"\(2, 2\).*one dimension"
    ),
    "a negative count": (
        lambda: SamplingMask.from_counts(integers(1, 2), integers(3, -1)), "counts",
        "-1 at least, 2 in all.*add up to 2",
    ),
    "counts of other ids": (
        lambda: SamplingMask.from_counts(integers(1, 2), integers(1, 2)), "counts",
        "3 in all.*add up to 2",
    ),
    "counts on another device": (
        lambda: SamplingMask.from_counts(integers(1, 2), ELSEWHERE), "counts", "meta.*cpu"
    ),
    "counted ids of two dimensions": (
        lambda: SamplingMask.from_counts(SQUARE, integers(4)), "token_ids", "one dimension"
    ),
    "rows of one dimension": (
        lambda: SamplingMask.from_padded(integers(1)), "token_ids", r"\(1,\).*\(N, K\)"
    ),
    "rows of floats": (
        lambda: SamplingMask.from_padded(torch.ones(1, 1)), "token_ids", "float32.*integers"
    ),
    "a negative id in a row": (
        lambda: SamplingMask.from_padded(SQUARE - 1, pad=5), "token_ids", "-1.*at least 0"
    ),
    "an id twice in a row": (
        lambda: SamplingMask.from_padded(SQUARE), "token_ids", "0 twice in the set of token 0"
    ),
    "padding of a half": (lambda: SamplingMask.from_padded(SQUARE, pad=0.5), "pad", "0.5.*integer"),
    "padding and sizes": (
        lambda: SamplingMask.from_padded(SQUARE, pad=0, sizes=integers(1, 1)), "pad", "0.*None"
    ),
    "sizes of floats": (
        lambda: SamplingMask.from_padded(SQUARE, sizes=torch.ones(2)), "sizes", "float32.*integers"
    ),
    "sizes of another shape": (
        lambda: SamplingMask.from_padded(SQUARE, sizes=integers(1)), "sizes", r"\(1,\).*\(2,\)"
    ),
    "sizes past the row": (
        lambda: SamplingMask.from_padded(SQUARE, sizes=integers(1, 3)), "sizes", "3.*from 0 to 2"
    ),
    "a negative size": (
        lambda: SamplingMask.from_padded(SQUARE, sizes=integers(1, -1)), "sizes", "-1.*from 0 to 2"
    ),
    "sizes on another device": (
        lambda: SamplingMask.from_padded(SQUARE, sizes=ELSEWHERE), "sizes", "meta.*cpu"
    ),
    "a part of steps": (lambda: SamplingMask.from_lists(SETS)[::2], "tokens", "2.*step 1"),
    "a part of one": (lambda: SamplingMask.from_lists(SETS)[3], "tokens", "int.*integers"),
    "a part of floats": (
        lambda: SamplingMask.from_lists(SETS)[torch.ones(1)], "tokens", "float32.*integers"
    ),
    "a part by bools": (
        lambda: SamplingMask.from_lists(SETS)[torch.ones(5).bool()], "tokens", r"\(5,\).*\(6,\)"
    ),
    "a part of two dimensions": (
        lambda: SamplingMask.from_lists(SETS)[SQUARE], "tokens", r"\(2, 2\).*one dimension"
    ),
    "a token past the end": (
        lambda: SamplingMask.from_lists(SETS)[integers(1, 6)], "tokens", "6.*6 tokens"
    ),
    "a token before the first": (
        lambda: SamplingMask.from_lists(SETS)[integers(-7)], "tokens", "-7.*6 tokens"
    ),
    "tokens on another device": (
        lambda: SamplingMask.from_lists(SETS)[ELSEWHERE], "tokens", "meta.*cpu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    make, argument, words = BAD[name]
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: (?s:.*){words}"):
        make()


WRONG = {
    "a negative id": ((3, -2), (0, 1, 2)),
    "an id twice": ((4, 4), (0, 2, 2)),
    "offsets that fall": ((1, 2), (0, 3, 2)),
    "offsets that begin late": ((1, 2), (1, 2, 2)),
    "offsets that end early": ((1, 2), (0, 0, 1)),
    "offsets far outside": ((1, 2), (0, 2**62, -(2**62))),
}


@pytest.mark.parametrize("name", WRONG)
def test_where_nobody_looks_wrong_sets_make_all_calls_nan(name, backend, device, monkeypatch):
    """As on a GPU: no error where a mask is made, nor where parts are taken of it."""
    for module in (sampling, checks, ops):
        monkeypatch.setattr(module, "may_synchronise", lambda value: False)
    ids, offsets = (torch.tensor(x, device=device) for x in WRONG[name])
    whole = SamplingMask(ids, offsets, missing_label="full")
    logits, labels = torch.randn(1, 2, 9, device=device), torch.zeros(1, 2, dtype=torch.long)
    for mask in (whole, whole[:2], whole[torch.tensor([0, 1], device=device)], whole.to(device)):
        assert mask.largest == sampling.NO_WORD
        out = r2vpo_loss(
            logits, labels.to(device), None, torch.ones(1, device=device), sampling_mask=mask,
            backend=backend,
        )  # fmt: skip
        assert out.loss.isnan()
        logps = token_logps(logits, labels.to(device), sampling_mask=mask, backend=backend)
        assert logps.isnan().all()
