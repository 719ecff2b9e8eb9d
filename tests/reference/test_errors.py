"""Bad input: one clear error that names the argument, what came and what was expected."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from r2vpo_kernels import (
    SamplingMask,
    VarianceConstraint,
    checks,
    fenchel_coef,
    linear_token_logps,
    ops,
    r2vpo_loss,
    r2vpo_loss_from_logps,
)
from r2vpo_kernels import token_logps as token_logps_entry
from r2vpo_kernels.batch import Batch
from r2vpo_kernels.objective import Objective

B, T, V = 3, 4, 10


def good():
    return {
        "logits": torch.randn(B, T, V),
        "labels": torch.randint(0, V, (B, T)),
        "old_logps": torch.full((B, T), -2.0),
        "advantages": torch.randn(B),
    }


def packed(**changes):
    arguments = {
        "logits": torch.randn(6, V),
        "labels": torch.randint(0, V, (6,)),
        "old_logps": torch.full((6,), -2.0),
        "advantages": torch.randn(6),
    }
    return arguments | changes


def label(value):
    labels = torch.zeros(B, T, dtype=torch.long)
    labels[1, 2] = value
    return labels


def sets_with(word):
    return SamplingMask.from_lists([[0, 1]] * 5 + [[0, word]] + [[0, 1]] * 6)


SETS = SamplingMask.from_lists([[0, 1]] * 12)
IDS = torch.tensor([0, 1, 1])
CLIP = {"policy_loss": "clip", "clip_range": 0.2}
BAD = {
    # name: (changes, the argument named, words of the message)
    "logits of integers": ({"logits": torch.ones(B, T, V, dtype=torch.long)}, "logits", "int64"),
    "logits not a tensor": ({"logits": [1.0]}, "logits", "list"),
    "jagged logits": (
        {"logits": torch.nested.nested_tensor([torch.randn(n, V) for n in (4, 2)],
                                              layout=torch.jagged)},
        "logits", r"jagged.*values\(\).*cu_seqlens",
    ),
    "a sparse mask": ({"mask": torch.ones(B, T).to_sparse()}, "mask", "sparse_coo.*dense"),
    "sparse labels": ({"labels": label(0).to_sparse()}, "labels", "sparse_coo.*dense"),
    "sparse weights": (
        {"importance_weights": torch.ones(B).to_sparse()}, "importance_weights", "sparse_coo.*dense"
    ),
    "sparse logits": ({"logits": torch.randn(B, T, V).to_sparse()}, "logits", "sparse_coo"),
    "logits of one dimension": ({"logits": torch.randn(V)}, "logits", r"\(10,\).*\(B, T, V\)"),
    "no vocabulary": ({"logits": torch.randn(B, T, 0)}, "logits", "V of at least 1"),
    "a strided vocabulary": (
        {"logits": torch.randn(B, V, T).transpose(1, 2)}, "logits", "contiguous vocabulary"
    ),
    "labels of floats": ({"labels": torch.zeros(B, T)}, "labels", "float32.*integers"),
    "labels of bools": ({"labels": torch.zeros(B, T).bool()}, "labels", "bool.*integers"),
    "labels of another shape": ({"labels": torch.zeros(B, T + 1).long()}, "labels", r"\(3, 4\)"),
    "a label of V": ({"labels": label(V)}, "labels", "got 10 at 6, expected 0 <= label"),
    "a negative label": ({"labels": label(-1)}, "labels", "got -1 at 6, expected 0 <= label"),
    "old_logps of another shape": ({"old_logps": torch.zeros(B)}, "old_logps", r"\(3,\).*\(3, 4\)"),
    "old_logps not a tensor": ({"old_logps": 0.5}, "old_logps", "float.*tensor"),
    "advantages of another shape": (
        {"advantages": torch.zeros(T)}, "advantages", r"\(4,\).*\(3, 4\).*\(3,\)"
    ),
    "complex advantages": ({"advantages": torch.zeros(B) * 1j}, "advantages", "complex"),
    "an ignore_index of None": ({"ignore_index": None}, "ignore_index", "None.*integer"),
    "a mask of another shape": ({"mask": torch.ones(B)}, "mask", r"\(3,\).*\(3, 4\)"),
    "a negative coefficient": ({"variance_coef": -1.0}, "variance_coef", "-1.0.*0"),
    "a negative coefficient tensor": (
        {"variance_coef": torch.tensor(-1.0)}, "variance_coef", "-1.0.*at least 0"
    ),
    "a negative coefficient per token": (
        {"variance_coef": -torch.ones(B, T)}, "variance_coef", "-1.0 at 0"
    ),
    "a NaN coefficient": ({"variance_coef": float("nan")}, "variance_coef", "nan"),
    "an infinite coefficient": ({"variance_coef": float("inf")}, "variance_coef", "inf"),
    "a coefficient of a string": ({"variance_coef": "big"}, "variance_coef", "str"),
    "a temperature of zero": ({"temperature": 0.0}, "temperature", "0.0.*1e-06"),
    "a negative temperature": ({"temperature": torch.tensor(-1.0)}, "temperature", "-1.0"),
    "a bad temperature per sequence": ({"temperature": torch.zeros(B)}, "temperature", "0.0 at 0"),
    "a clamp past overflow": ({"log_ratio_clamp": 50.0}, "log_ratio_clamp", "50.0.*40"),
    "a negative clamp": ({"log_ratio_clamp": -1.0}, "log_ratio_clamp", "-1.0"),
    "an unknown reduction": ({"reduction": "mean"}, "reduction", "'mean'.*'token-mean'.*'none'"),
    "an unknown center": ({"center": "zero"}, "center", "'zero'.*'one', 'group'"),
    "an unknown level": ({"ratio_level": "word"}, "ratio_level", "'word'.*'token', 'sequence'"),
    "an unknown estimator": ({"kl_estimator": "k4"}, "kl_estimator", "'k4'.*'k1', 'k2', 'k3'"),
    "ranks that are no group": ({"tp_group": [0, 1]}, "tp_group", "list.*ProcessGroup.*None"),
    "an unknown backend": ({"backend": "c"}, "backend", "'c'.*'auto', 'eager', 'triton', 'cpp'"),
    "KL without a reference": ({"kl_coef": 0.1}, "ref_logps", "None.*kl_coef is 0.1"),
    "an unknown policy loss": (
        {"policy_loss": "ppo"}, "policy_loss", "'ppo'.*'ratio', 'clip', 'cispo'"
    ),
    "a clip without a range": ({"policy_loss": "clip"}, "clip_range", "None.*'clip'"),
    "CISPO without a range": ({"policy_loss": "cispo"}, "clip_range", "None.*'cispo'"),
    "a range without a clip": ({"clip_range": 0.2}, "clip_range", "0.2.*None.*'ratio'"),
    "a negative range": (CLIP | {"clip_range": -0.1}, "clip_range", "-0.1.*0"),
    "a negative upper range": (CLIP | {"clip_range": (0.2, -0.1)}, "clip_range", "-0.1.*0"),
    "a lower range above 1": (CLIP | {"clip_range": (1.1, 0.2)}, "clip_range", "1.1.*1"),
    "a range of three": (CLIP | {"clip_range": (0.1, 0.2, 0.3)}, "clip_range", "ε_low"),
    "a range of a tensor": (CLIP | {"clip_range": torch.ones(2)}, "clip_range", "Tensor.*number"),
    "a dual clip of 1": (CLIP | {"dual_clip": 1.0}, "dual_clip", "1.0.*above 1"),
    "a dual clip without a clip": ({"dual_clip": 3.0}, "dual_clip", "3.0.*None.*'ratio'"),
    "a dual clip of CISPO": (
        {"policy_loss": "cispo", "clip_range": 0.2, "dual_clip": 3.0}, "dual_clip", "3.0.*'cispo'"
    ),
    "an unbiased KL without a reference": ({"kl_unbiased": True}, "ref_logps", "None.*kl_unbiased"),
    "an unbiased KL of a number": (
        {"kl_unbiased": 1, "ref_logps": torch.zeros(B, T)}, "kl_unbiased", "int.*bool"
    ),
    "ref_logps of another shape": ({"ref_logps": torch.zeros(B)}, "ref_logps", r"\(3,\)"),
    "a KL coefficient tensor": (
        {"kl_coef": torch.ones(2), "ref_logps": torch.zeros(B, T)}, "kl_coef", "Tensor.*number"
    ),
    "a NaN entropy coefficient": ({"entropy_coef": float("nan")}, "entropy_coef", "nan"),
    "weights of another shape": (
        {"importance_weights": torch.ones(2)}, "importance_weights", r"\(2,\)"
    ),
    "group ids per token": ({"group_ids": torch.zeros(B, T).long(), "num_groups": 1}, "group_ids",
                            r"\(3, 4\).*\(3,\), one per sequence"),
    "group ids of floats": ({"group_ids": torch.zeros(B), "num_groups": 1}, "group_ids", "float32"),
    "a group id out of range": ({"group_ids": IDS, "num_groups": 1}, "group_ids",
                                "got 1 at 4, expected 0 <= id < 1"),
    "no number of groups": ({"group_ids": IDS}, "num_groups", "None"),
    "no groups": ({"group_ids": IDS, "num_groups": 0}, "num_groups", "0.*at least 1"),
    "groups without ids": ({"num_groups": 2}, "num_groups", "2.*None"),
    "two kinds of groups": ({"group_ids": IDS, "num_groups": 2, "group_size": 1}, "group_size",
                            "1.*None"),
    "a group size that is a bool": ({"group_size": True}, "group_size", "True.*whole number"),
    "a group size of a half": ({"group_size": np.float32(0.5)}, "group_size", "0.5.*whole number"),
    "a group size that does not divide": ({"group_size": 2}, "group_size", "2.*divisor.*3"),
    "means of another number": ({"center": torch.ones(2)}, "center", r"\(2,\).*\(1,\)"),
    "means of integers": ({"center": torch.ones(1).long()}, "center", "int64.*float"),
    "a normalizer without a denominator": ({"normalizer": 1.0, "reduction": "none"}, "normalizer",
                                           "1.0.*None"),
    "a normalizer of many": ({"normalizer": torch.ones(2)}, "normalizer", r"\(2,\)"),
    "a negative normalizer": ({"normalizer": -2.0}, "normalizer", "-2.0"),
    "a negative normalizer tensor": ({"normalizer": torch.tensor(-2.0)}, "normalizer", "-2.0"),
    "cu_seqlens with rows": ({"cu_seqlens": torch.tensor([0, 12])}, "cu_seqlens", "None"),
    "two devices": ({"old_logps": torch.zeros(B, T, device="meta")}, "old_logps", "meta.*cpu"),
    "labels on another device": ({"labels": torch.zeros(B, T, device="meta").long()}, "labels",
                                 "meta.*cpu"),
    "lists of words": ({"sampling_mask": [[1, 2]] * 12}, "sampling_mask", "list.*SamplingMask"),
    "a mask of other tokens": (
        {"sampling_mask": SETS[:11]}, "sampling_mask", "sets of 11 tokens.*12, one per label"
    ),
    "a mask on another device": ({"sampling_mask": SETS.to("meta")}, "sampling_mask", "meta.*cpu"),
    "a word of V": (
        {"sampling_mask": sets_with(V), "labels": label(0)}, "sampling_mask",
        r"got 10, expected token_ids from 0 to 9",
    ),
    "a word far outside": (
        {"sampling_mask": sets_with(2**40), "labels": label(0)}, "sampling_mask", "1099511627776"
    ),
    "a label outside of its set": (
        {"sampling_mask": SETS, "labels": label(3)}, "labels",
        "got 3 at 6, expected each in the token's set of sampling_mask",
    ),
    "float64 in a kernel": ({"logits": torch.randn(B, T, V).double(), "backend": "triton"},
                            "backend", "float64"),
}  # fmt: skip
BAD_PACKED = {
    "offsets that end early": ({"cu_seqlens": torch.tensor([0, 3, 5])}, "cu_seqlens", "5"),
    "offsets that begin late": ({"cu_seqlens": torch.tensor([1, 3, 6])}, "cu_seqlens", "1, 3, 6"),
    "offsets that fall": ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "cu_seqlens", "4, 2"),
    "offsets past the end": ({"cu_seqlens": torch.tensor([0, 60])}, "cu_seqlens", "60"),
    "offsets of floats": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens", "float32"),
    "no sequence at all": ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens", r"\(1,\).*6 tokens"),
    "as many sequences as tokens": (
        {"cu_seqlens": torch.tensor([0, 2, 2, 3, 4, 5, 6])}, "cu_seqlens", "one token in each"
    ),
    "a sequence mean without sequences": (
        {"reduction": "seq-mean-token-mean"}, "reduction", "cu_seqlens"
    ), "a sequence ratio without sequences": ({"ratio_level": "sequence"}, "ratio_level",
    "cu_seqlens"), "groups of sequences without them": ({"group_size": 2}, "group_size",
    "cu_seqlens"), "no T to divide by": (
        {"reduction": "seq-mean-token-sum-norm", "cu_seqlens": torch.tensor([0, 6]),
         "advantages": torch.zeros(1)}, "normalizer", "None"
    ),
    "advantages per sequence without them": (
        {"advantages": torch.zeros(2)}, "advantages", r"\(2,\).*\(6,\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    changes, argument, words = BAD[name]
    arguments = good() | changes
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: (?s:.*){words}"):
        r2vpo_loss(**arguments)


@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_packed_input_is_refused(name):
    changes, argument, words = BAD_PACKED[name]
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: (?s:.*){words}"):
        r2vpo_loss(**packed(**changes))


ELSEWHERE = {"logits", "labels", "temperature", "backend", "entropy_coef", "ignore_index"}
ELSEWHERE |= {"tp_group", "sampling_mask"}
FROM_LOGPS = [name for name, (changes, _, _) in BAD.items() if not ELSEWHERE & set(changes)]


@pytest.mark.parametrize("name", FROM_LOGPS)
def test_the_entry_from_logps_refuses_the_same(name):
    changes, argument, words = BAD[name]
    arguments = good() | {"logps": torch.zeros(B, T)} | changes
    del arguments["logits"], arguments["labels"]
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: (?s:.*){words}"):
        r2vpo_loss_from_logps(**arguments)


@pytest.mark.parametrize(
    "changes, argument",
    [
        ({"logps": torch.zeros(B, T).long()}, "logps"),
        ({"logps": torch.zeros(B, T, 2)}, "logps"),
        ({"entropy_coef": 0.1}, "entropy"),
        ({"temperature": 0.5}, "temperature"),
        ({"entropy": torch.zeros(B)}, "entropy"),
        ({"entropy": torch.zeros(B, T).long()}, "entropy"),
    ],
)
def test_bad_logps_are_refused(changes, argument):
    arguments = {"logps": torch.zeros(B, T), "old_logps": None, "advantages": torch.zeros(B)}
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        r2vpo_loss_from_logps(**(arguments | changes))


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, (c, _, _) in BAD.items()
        if set(c) <= {"logits", "labels", "temperature", "mask", "tp_group", "sampling_mask"}
    ],
)
def test_token_logps_refuses_the_same(name):
    changes, argument, words = BAD[name]
    arguments = good() | changes
    del arguments["old_logps"], arguments["advantages"]
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: (?s:.*){words}"):
        token_logps_entry(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_a_label_outside_of_its_set_takes_the_full_vocabulary_if_told_to(backend):
    logits, labels = torch.randn(B, T, V), label(3)
    sets = SamplingMask.from_lists([[0, 1]] * 12, missing_label="full")
    logps = token_logps_entry(logits, labels, sampling_mask=sets, backend=backend)
    whole = token_logps_entry(logits, labels, backend=backend)
    assert (logps == whole).reshape(-1).tolist() == [i == 6 for i in range(12)]
    # It must be a word all the same.
    with pytest.raises(ValueError, match=r"^labels: got 10 at 6, expected 0 <= label"):
        token_logps_entry(logits, label(V), sampling_mask=sets, backend=backend)


def unseen(monkeypatch):
    """As on a GPU: the host does not look at values, and a bad one goes on to the kernels."""
    for module in (checks, ops):
        monkeypatch.setattr(module, "may_synchronise", lambda value: False)


def test_a_bad_label_never_reaches_memory(backend, monkeypatch):
    unseen(monkeypatch)
    logits = torch.randn(1, 2, V)
    logps = token_logps_entry(logits, torch.tensor([[V, 3]]), backend=backend)
    assert logps[0, 0].isnan() and logps[0, 1].isfinite()


def test_a_bad_label_is_not_written_to_either(kernels, monkeypatch):
    """In place, with what lies after the last row watched."""
    unseen(monkeypatch)
    memory = torch.randn(2 * V + 8)
    before = memory.clone()
    call = ops.Call(
        Batch(torch.Size((1, 2)), torch.tensor([[3, V]]), reduction="token-mean"),
        Objective(advantages=torch.ones(1)), False, kernels,
    )  # fmt: skip
    rows = memory[: 2 * V].view(1, 2, V)
    ops.one_pass_(rows, *call.flat(rows))
    assert torch.equal(memory[2 * V :], before[2 * V :])
    assert memory[:V].isfinite().all() and memory[V : 2 * V].isnan().any()


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"target": -1.0}, "target"),
        ({"target": 0.0}, "target"),
        ({"target": 0.1, "center": "two"}, "center"),
        ({"target": 0.1, "lr": -1.0}, "lr"),
        ({"target": 0.1, "min_coef": 3.0, "max_coef": 2.0}, "max_coef"),
        ({"target": 0.1, "coef": 1e6}, "coef"),
        ({"target": 0.1, "min_coef": 0.0}, "min_coef"),
        ({"target": "0.1"}, "target"),
    ],
)
def test_bad_constraints_are_refused(arguments, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        VarianceConstraint(**arguments)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"target": 0.0}, "target"),
        ({"center": "two"}, "center"),
        ({"weight": torch.ones(2)}, "weight"),
        ({"weight": -torch.ones(3)}, "weight"),
        ({"group_ids": IDS, "center": "group"}, "num_groups"),
        ({"group_ids": IDS[:2], "num_groups": 2}, "group_ids"),
        ({"group_ids": IDS, "num_groups": 1}, "group_ids"),
        ({"advantages": [1.0]}, "advantages"),
    ],
)
def test_bad_fenchel_arguments_are_refused(arguments, name):
    arguments = {"advantages": torch.ones(3), "target": 0.1} | arguments
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        fenchel_coef(**arguments)


@pytest.mark.parametrize("whole", [np.int64(2), np.uint8(2), np.array(2)])
@pytest.mark.parametrize("half", [np.float32(0.5), np.float64(0.5), np.array(0.5), Fraction(1, 2)])
def test_whatever_is_a_number_is_one(whole, half):
    """As numbers.Integral and numbers.Real have it."""
    arguments = good() | {"reduction": "seq-mean-token-sum-norm", "ref_logps": torch.zeros(B, T)}
    arguments = {name: x[:2] for name, x in arguments.items() if isinstance(x, torch.Tensor)}

    def results(whole, half):
        out = r2vpo_loss(
            **arguments, group_size=whole, ignore_index=whole, variance_coef=half, kl_coef=half,
            entropy_coef=half, log_ratio_clamp=half, temperature=half, normalizer=half,
        )  # fmt: skip
        constraint = VarianceConstraint(half, coef=half, lr=half, min_coef=half, max_coef=half)
        constraint.step(out.stats)
        ids = torch.zeros(2, dtype=torch.long)
        groups = fenchel_coef(
            arguments["advantages"], half, center="group", group_ids=ids, num_groups=whole
        )
        hidden, head = arguments["logits"], torch.ones(V, V)
        logps = linear_token_logps(
            hidden, head, arguments["labels"], softcap=half, logit_scale=half, chunk_tokens=whole
        )
        return out.loss, constraint.coef, groups, logps

    for ours, theirs in zip(results(whole, half), results(2, 0.5), strict=True):
        assert torch.equal(ours, theirs)
