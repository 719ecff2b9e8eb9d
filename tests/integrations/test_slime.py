"""slime: its contract, what its custom loss is given and calls."""

from argparse import Namespace

import pytest
import torch
from support.trainers import CLIP, NAN, formula


def slime_module(args_seen):
    """What slime's megatron_utils.loss gives: log-probs of the labels, one token before each."""

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False
    ):
        assert logits.dtype == torch.float32 and logits.dim() == 3 and logits.shape[0] == 1
        args_seen.append(args)
        log_p = (logits[0].double() / args.rollout_temperature).log_softmax(-1)
        result, end = {"log_probs": [], "entropy": []}, 0
        for tokens, total, response in zip(
            unconcat_tokens, total_lengths, response_lengths, strict=True
        ):
            end += total
            rows = log_p[end - response - 1 : end - 1]
            result["log_probs"].append(rows.gather(-1, tokens[-response:, None])[:, 0])
            result["entropy"].append(-(rows.exp() * rows).sum(-1))
        return torch.empty(0), result

    def compute_approx_kl(log_probs, log_probs_base, kl_loss_type, importance_ratio=None):
        r = log_probs - log_probs_base
        kl = {"k1": r, "k2": r**2 / 2}.get(kl_loss_type, (-r).exp() - 1 + r)
        kl = kl if importance_ratio is None else importance_ratio * kl
        return kl.clamp(-10, 10) if kl_loss_type == "low_var_kl" else kl

    return {
        "compute_approx_kl": compute_approx_kl,
        "get_log_probs_and_entropy": get_log_probs_and_entropy,
        "get_rollout_top_p_logprob_kwargs": lambda args, batch: {},
    }


def slime_reducer(lengths, masks, denominators):
    def sum_of_sample_mean(x):
        parts = zip(x.split(lengths), masks, denominators, strict=True)
        return sum((part * m).sum() / d.clamp(min=1) for part, m, d in parts)

    return sum_of_sample_mean


def slime_case(stand_in, cp_slice=lambda x, total, response: x):
    seen = []
    adapter = stand_in(
        "slime",
        slime__backends__megatron_utils__loss=slime_module(seen),
        slime__backends__megatron_utils__cp_utils={"slice_log_prob_with_cp": cp_slice},
    )
    g = torch.Generator().manual_seed(1)
    totals, lengths = [6, 7, 4], [3, 4, 2]
    tokens = [torch.randint(0, 11, (n,), generator=g) for n in totals]
    logits = torch.randn(1, sum(totals), 11, generator=g).requires_grad_()
    masks = [torch.tensor(m, dtype=torch.int32) for m in ([1, 1, 0], [1, 0, 1, 1], [1, 1])]
    holes = [torch.where(m == 1, 0.0, NAN).double() for m in masks]

    def per_token(scale=1.0):
        return [scale * torch.randn(n, generator=g, dtype=torch.float64) for n in lengths]

    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": lengths,
        "loss_masks": masks,
        "advantages": [a + h for a, h in zip(per_token(), holes, strict=True)],
        "log_probs": [x - 2.5 + h for x, h in zip(per_token(0.3), holes, strict=True)],
        "rollout_log_probs": [x - 2.5 for x in per_token(0.3)],
        "ref_log_probs": [x - 2.5 + h for x, h in zip(per_token(0.3), holes, strict=True)],
    }
    args = Namespace(
        rollout_temperature=0.7, use_rollout_logprobs=False, entropy_coef=0.0, use_kl_loss=False,
        kl_loss_coef=0.05, kl_loss_type="k1", use_tis=False, use_opsm=False, use_unbiased_kl=False,
        get_mismatch_metrics=False, r2vpo_variance_coef=1.5, advantage_estimator="grpo",
    )  # fmt: skip
    # One rollout made the first two samples: they share a denominator.
    denominators = [torch.tensor(5), torch.tensor(5), torch.tensor(2)]
    reducer = slime_reducer(lengths, masks, denominators)
    scored = slime_module([])["get_log_probs_and_entropy"](
        logits, args=args, unconcat_tokens=tokens, total_lengths=totals, response_lengths=lengths
    )[1]
    return adapter, args, batch, logits, reducer, scored, denominators


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3", "low_var_kl"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_slime(stand_in, level, kl, unbiased):
    adapter, args, batch, logits, reducer, scored, denominators = slime_case(stand_in)
    args.r2vpo_ratio_level, args.use_unbiased_kl = level, unbiased
    args.use_kl_loss, args.kl_loss_type = kl is not None, kl or "k1"
    args.entropy_coef = 0.02
    args.use_rollout_logprobs = level == "sequence"
    old = batch["rollout_log_probs" if level == "sequence" else "log_probs"]
    batch["ref_log_probs"][1][2] = 1.5  # where k3 is above 10
    loss, logged = adapter.r2vpo_loss_function(args, batch, logits, reducer)
    expected = 0.0
    for i, m in enumerate(batch["loss_masks"]):
        m = m == 1
        logps = scored["log_probs"][i]
        terms = formula(logps[None], old[i][None], batch["advantages"][i][None], m[None],
                        coef=1.5, level=level)[0]  # fmt: skip
        terms = terms - 0.02 * torch.where(m, scored["entropy"][i], 0.0)
        if kl:
            r = torch.where(m, logps, 0.0) - torch.where(m, batch["ref_log_probs"][i], 0.0)
            three = (-r).exp() - 1 + r
            each = {"k1": r, "k2": r**2 / 2, "k3": three, "low_var_kl": three}[kl]
            if unbiased:
                each = each * torch.where(m, logps - old[i], 0.0).exp()
            terms = terms + 0.05 * (each.clamp(-10, 10) if kl == "low_var_kl" else each)
        expected = expected + terms.sum() / denominators[i]
    (gradient,) = torch.autograd.grad(loss, logits)
    (truth,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    # The gradient reaches logits in float32, by one rounding at the end.
    torch.testing.assert_close(gradient, truth, rtol=2**-23, atol=1e-12)
    assert truth.abs().max() > 1e-3
    assert all(x.dim() == 0 and x.isfinite() and not x.requires_grad for x in logged.values())
    torch.testing.assert_close(logged["loss"], loss.detach())


def test_slime_clips(stand_in):
    """Without a penalty, unless one is set."""
    adapter, args, batch, logits, reducer, scored, denominators = slime_case(stand_in)
    del args.r2vpo_variance_coef
    for name, value in CLIP.items():
        setattr(args, f"r2vpo_{name}", value)
    loss, _ = adapter.r2vpo_loss_function(args, batch, logits, reducer)
    columns = [torch.cat(x)[None] for x in (scored["log_probs"], batch["log_probs"])]
    advantages, mask = (torch.cat(batch[n])[None] for n in ("advantages", "loss_masks"))
    terms = formula(*columns, advantages, mask == 1, coef=0.0, clip=CLIP["clip_range"])[0]
    parts = zip(terms.split(batch["response_lengths"]), denominators, strict=True)
    expected = sum(part.sum() / d for part, d in parts)
    (gradient,) = torch.autograd.grad(loss, logits)
    (truth,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, truth, rtol=2**-23, atol=1e-12)


def test_slime_context_parallel_slices_masks_and_empty_ranks(stand_in):
    """A rank holds part of each response: its masks are sliced, and it may hold nothing."""
    adapter, args, batch, logits, _, _, _ = slime_case(
        stand_in, cp_slice=lambda x, total, response: x[:1]
    )
    parts = {n: [x[:1] for x in batch[n]] for n in ("advantages", "log_probs", "ref_log_probs")}
    whole = adapter.loss.get_log_probs_and_entropy

    def sliced(keep):
        def get(*a, **k):
            _, scored = whole(*a, **k)
            parts = {name: [x[:keep] for x in xs] for name, xs in scored.items()}
            # As slime's own all-gather leaves a rank without tokens: outside the graph.
            return None, parts if keep else {n: [x.detach() for x in xs] for n, xs in parts.items()}

        return get

    adapter.loss.get_log_probs_and_entropy = sliced(1)
    _, scored = sliced(1)(
        logits,
        args=args,
        **{n: batch[n] for n in ("unconcat_tokens", "total_lengths", "response_lengths")},
    )
    loss, _ = adapter.r2vpo_loss_function(args, batch | parts, logits, torch.sum)
    one = torch.ones(1, 1, dtype=torch.bool)
    columns = zip(scored["log_probs"], parts["log_probs"], parts["advantages"], strict=True)
    expected = sum(formula(*(x[None] for x in xs), one, coef=1.5).sum() for xs in columns)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)

    args.r2vpo_ratio_level = "sequence"
    with pytest.raises(ValueError, match="r2vpo_ratio_level: got 'sequence'"):
        adapter.r2vpo_loss_function(args, batch | parts, logits, torch.sum)
    args.r2vpo_ratio_level = "token"
    adapter.loss.get_log_probs_and_entropy = sliced(0)
    adapter.cp_utils.slice_log_prob_with_cp = lambda x, total, response: x[:0]
    nothing = {n: [x[:0] for x in batch[n]] for n in parts}
    loss, _ = adapter.r2vpo_loss_function(args, batch | nothing, logits, torch.sum)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (gradient == 0).all()


def test_slime_bad_input(stand_in):
    adapter, args, batch, logits, reducer, _, _ = slime_case(stand_in)

    def error(match, batch=batch, **changes):
        with pytest.raises(ValueError, match=match):
            adapter.r2vpo_loss_function(Namespace(**vars(args) | changes), batch, logits, reducer)

    error("log_probs: got None", batch=batch | {"log_probs": None})
    dropped = {k: v for k, v in batch.items() if k != "rollout_log_probs"}
    error("rollout_log_probs: got None", batch=dropped, use_rollout_logprobs=True)
    error("ref_log_probs: got None", batch=batch | {"ref_log_probs": []}, use_kl_loss=True)
    error("center: got 'group'", r2vpo_center="group")
    for estimator in ("gspo", "cispo"):
        error(f"advantage_estimator: got {estimator}", advantage_estimator=estimator)
    for option in (
        "use_tis", "use_opsm", "get_mismatch_metrics", "custom_pg_loss_reducer_function_path",
    ):  # fmt: skip
        error(f"{option}: got True, expected it unset", **{option: True})
