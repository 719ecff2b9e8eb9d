"""Adapters of trainers, each called as its trainer calls it, against a formula written out here.

OpenRLHF's and torchtitan's own files take part, from their wheels; where their package needs a GPU
stack to import, loaded as files. The other trainers cannot be installed beside these tests: what
their hooks pass, and what an adapter calls of them, stands here as VERSIONS have it.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import subprocess
import sys
import types
from argparse import Namespace

import pytest
import torch

from r2vpo_kernels import r2vpo_loss
from r2vpo_kernels.integrations import check_version

VERSIONS = {"slime": "0.3.1", "nemo-rl": "0.7.0", "prime-rl": "0.8.0", "skyrl": "0.3.0"}
NAN = float("nan")
# What `import r2vpo_kernels` must leave alone.
FRAMEWORKS = ("verl", "openrlhf", "slime", "nemo_rl", "prime_rl", "skyrl", "torchtitan", "trl")


def case(rows=3, length=5, seed=0):
    """A padded batch in float64: (logps, old, advantages, mask, rollout). Some rows are short, the
    last is masked throughout; masked tokens hold NaN."""
    g = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return scale * torch.randn(rows, length, generator=g, dtype=torch.float64)

    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[:, 0], mask[-1] = True, False
    old = -draw().abs() - 0.1
    logps, rollout, advantages = old + draw(0.4), old + draw(0.2), draw()
    tensors = [torch.where(mask, x, NAN) for x in (logps, old, advantages, rollout)]
    return tensors[0].requires_grad_(), *tensors[1:3], mask, tensors[3]


def formula(logps, old, advantages, mask, *, coef=0.5, level="token", weight=1.0, clip=None):
    """Per token -s·A·ρ + λ·(ρ - 1)², 0 where masked, in plain torch; max(-s·A·ρ, -s·A·clamp(ρ)) by
    clip (ε_low, ε_high)."""
    logps, old, advantages = (torch.where(mask, x, 0.0) for x in (logps, old, advantages))
    delta = logps - old
    if level == "sequence":
        delta = (delta.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)) + 0 * delta
    ratio = delta.exp()
    policy = -weight * advantages * ratio
    if clip is not None:
        clipped = -weight * advantages * ratio.clamp(1 - clip[0], 1 + clip[1])
        assert 0 < (policy < clipped)[mask].sum() < mask.sum()
        policy = torch.maximum(policy, clipped)
    return torch.where(mask, policy + coef * (ratio - 1) ** 2, 0.0)


# As YAML and TOML have it.
CLIP = {"policy_loss": "clip", "clip_range": [0.1, 0.2]}


def assert_same(loss, expected, leaf):
    """Loss and gradient in float64: a few hundred roundings of terms that stay below 100."""
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (truth,) = torch.autograd.grad(expected, leaf, retain_graph=True)
    assert truth.abs().max() > 1e-3
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-12)


@pytest.fixture
def stand_in(monkeypatch):
    """Modules under the trainers' names, and the adapter imported on top of them."""
    for name in list(sys.modules):
        if name.startswith("r2vpo_kernels.integrations."):
            monkeypatch.delitem(sys.modules, name)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: VERSIONS.get(n) or real(n))

    def install(adapter, **modules):
        for path, content in modules.items():
            parts = path.split("__")
            for i in range(1, len(parts)):
                parent = ".".join(parts[:i])
                if parent not in sys.modules:
                    package = types.ModuleType(parent)
                    package.__path__ = []
                    monkeypatch.setitem(sys.modules, parent, package)
            name = ".".join(parts)
            if not isinstance(content, types.ModuleType):
                module = types.ModuleType(name)
                vars(module).update(content)
                content = module
            monkeypatch.setitem(sys.modules, name, content)
            monkeypatch.setattr(
                sys.modules[".".join(parts[:-1])], parts[-1], content, raising=False
            )
        return importlib.import_module(f"r2vpo_kernels.integrations.{adapter}")

    return install


def wheel_file(package, ending, name):
    """A module loaded from a file of an installed distribution, without importing its package."""
    (path,) = (f for f in importlib.metadata.files(package) if str(f).endswith(ending))
    spec = importlib.util.spec_from_file_location(name, path.locate())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# OpenRLHF


@pytest.fixture
def openrlhf(stand_in, monkeypatch):
    for name in ("openrlhf", "openrlhf.models", "openrlhf.models.utils", "openrlhf.models.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["openrlhf"].__path__ = sys.modules["openrlhf.models"].__path__ = []
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    wheel_file("openrlhf", "openrlhf/models/utils.py", "openrlhf.models.utils")
    real = wheel_file("openrlhf", "openrlhf/models/loss.py", "openrlhf.models.loss")
    return real.PolicyLoss, stand_in("openrlhf").R2VPOPolicyLoss


OPENRLHF = {
    "token mean": ({}, {}),
    "sample mean": ({"token_level_loss": False}, {}),
    "gspo": ({"policy_loss_type": "gspo"}, {}),
    "a global token mean": ({}, {"dp_size": 2, "batch_num_tokens": 40.0}),
    "a global sample mean": ({"token_level_loss": False}, {"dp_size": 2, "global_batch_size": 9}),
    "tokens clipped": ({"is_correction_level": "token", "is_correction_mode": "clip"}, {}),
    "tokens dropped": ({"is_correction_level": "token"}, {}),
    "sequences dropped": ({"is_correction_level": "seq"}, {}),
    "gspo corrected": ({"policy_loss_type": "gspo", "is_correction_level": "token"}, {}),
}


@pytest.mark.parametrize("name", OPENRLHF)
def test_openrlhf_without_penalty_and_clip_is_openrlhf(openrlhf, name):
    real, ours = openrlhf
    arguments, batch_info = OPENRLHF[name]
    arguments = arguments | {"is_correction_threshold": [0.9, 1.15]}
    # Not masked NaN: the real class cannot have that.
    logps, old, advantages, mask, rollout = (x.detach().nan_to_num() for x in case(6, 7))
    logps.requires_grad_()
    given = (logps, old, advantages, mask.double(), rollout)
    expected = real(clip_eps_low=1e9, clip_eps_high=1e9, **arguments)(*given, **batch_info)
    out = ours(variance_coef=0.0, **arguments)(*given, **batch_info)
    assert_same(out[0], expected[0], logps)
    assert out[1] == expected[1] == 0
    clip = {"clip_eps_low": 0.1, "clip_eps_high": 0.2}
    for options in (clip, clip | {"dual_clip": 1.3}):
        clipped = real(**options, **arguments)(*given, **batch_info)
        got = ours(policy_loss="clip", **options, **arguments)(*given, **batch_info)
        assert_same(got[0], clipped[0], logps)
        # OpenRLHF's share leaves out the dual clip, and has dropped tokens in it.
        if "dual_clip" not in options and "dropped" not in name:
            assert got[1] > 0
            torch.testing.assert_close(got[1], clipped[1], rtol=0, atol=1e-6, check_dtype=False)
    for mine, theirs in zip(out[2:], expected[2:], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    signature = inspect.signature(real.forward).parameters
    assert list(inspect.signature(ours.forward).parameters)[:6] == list(signature)[:6]


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_openrlhf_with_penalty_and_masked_nan(openrlhf, kind, correction):
    logps, old, advantages, mask, rollout = case()
    arguments = {"policy_loss_type": kind, "variance_coef": 1.5}
    weight, kept, behaviour = 1.0, mask, old
    if correction:
        low, high = 0.9, 1.2
        arguments |= {"is_correction_level": "token", "is_correction_threshold": [low, high]}
        if kind == "gspo":
            behaviour = rollout
        else:
            weight = torch.where(mask, (old - rollout).exp(), 0.0)
            kept = mask & (weight >= low) & (weight <= high)
            assert 0 < kept.sum() < mask.sum()
    loss, *rest = openrlhf[1](**arguments)(
        logps, old, advantages, mask.double(), rollout, dp_size=2, batch_num_tokens=11.0,
        global_batch_size=7,
    )  # fmt: skip
    if kind == "gspo":
        terms = formula(logps, behaviour, advantages, mask, coef=1.5, level="sequence")
        expected = (terms.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / 7 * 2
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)  # OpenRLHF's 1e-8 in it
        loss, expected = loss - loss.detach(), loss - loss.detach()
    else:
        terms = formula(logps, old, advantages, kept, coef=1.5, weight=weight)
        expected = terms.sum() / 11 * 2
    assert_same(loss, expected, logps)
    assert all(x is None or x.isfinite() for x in rest)


def test_openrlhf_bad_input(openrlhf):
    _, ours = openrlhf
    logps, old, advantages, mask, _ = case()
    with pytest.raises(ValueError, match=r"old_log_probs: got None, expected .*\(3, 5\)"):
        ours()(logps, None, advantages, mask)
    with pytest.raises(ValueError, match="rollout_log_probs: got None"):
        ours(is_correction_level="token")(logps, old, advantages, mask)
    with pytest.raises(ValueError, match="center: got 'group', expected 'one'"):
        ours(center="group")(logps, old, advantages, mask)
    with pytest.raises(ValueError, match=r"dual_clip: got 3.0, expected it unset"):
        ours(dual_clip=3.0)
    with pytest.raises(ValueError, match="is_correction_gating: got 'tv'"):
        ours(is_correction_level="token", is_correction_gating="tv",
             is_correction_threshold=[0, 0.1])  # fmt: skip
    with pytest.raises(TypeError, match="variance_coeff"):
        ours(variance_coeff=1.0)


# slime


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


# NeMo-RL


def nemo_modules():
    class LossType:
        TOKEN_LEVEL, SEQUENCE_LEVEL = "token_level", "sequence_level"

    def masked_mean(values, mask, dim=None, global_normalization_factor=None):
        n = global_normalization_factor
        n = torch.sum(mask, dim=dim) if n is None else n
        return torch.sum(values * mask, dim=dim) / (n + 1e-8)

    class ClippedPGLossFn:
        """The surrogate, clipped on both sides of the ratio."""

        def __init__(self, cfg):
            self.ratio_clip_min, self.ratio_clip_max = cfg.ratio_clip_min, cfg.ratio_clip_max
            self.force_on_policy_ratio = cfg.force_on_policy_ratio
            self.sequence_level_importance_ratios = cfg.sequence_level_importance_ratios
            token = cfg.token_level_loss
            self.loss_type = LossType.TOKEN_LEVEL if token else LossType.SEQUENCE_LEVEL

        def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
            token_mask, samples = data["token_mask"][:, 1:], data["sample_mask"]
            mask, curr = token_mask * samples[:, None], next_token_logprobs
            prev = curr.detach() if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
            ratio = (curr - prev).exp()
            if self.sequence_level_importance_ratios:
                ratio = masked_mean(curr - prev, token_mask, -1).exp()[:, None] + 0 * ratio
            advantages = data["advantages"][:, 1:]
            clipped = ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)
            loss = torch.max(-advantages * ratio, -advantages * clipped)
            if self.loss_type == LossType.TOKEN_LEVEL:
                loss = masked_mean(loss, mask, None, global_valid_toks)
            else:
                rows = masked_mean(loss, token_mask, -1)
                loss = masked_mean(rows, samples, None, global_valid_seqs)
            return loss, {"loss": loss.item(), "gen_kl_error": 0.0, "token_mult_prob_error": 1.0}

    return {
        "nemo_rl__algorithms__loss__interfaces": {"LossType": LossType},
        "nemo_rl__algorithms__loss__loss_functions": {"ClippedPGLossFn": ClippedPGLossFn},
        "nemo_rl__algorithms__utils": {"masked_mean": masked_mean},
    }


def nemo_case(stand_in, **changes):
    adapter = stand_in("nemo_rl", **nemo_modules())
    cfg = Namespace(
        disable_ppo_ratio=False, ratio_clip_c=None, use_cispo=False, ratio_clip_min=0.2,
        ratio_clip_max=0.2, force_on_policy_ratio=False, sequence_level_importance_ratios=False,
        token_level_loss=True, variance_coef=1.5,
    )  # fmt: skip
    vars(cfg).update(changes)
    logps, old, advantages, mask, _ = (x.detach().nan_to_num() for x in case(4, 6, seed=3))
    mask = mask.bool()
    mask[1] = True

    def full(x):
        return torch.cat([torch.full_like(x[:, :1], 7.0), x], 1)

    data = {
        "token_mask": full(mask.double()),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
        "prev_logprobs": full(old),
        "advantages": full(advantages),
    }
    return adapter, cfg, logps.requires_grad_(), data, old, advantages, mask


@pytest.mark.parametrize(
    ("level", "by_token"), [("token", True), ("token", False), ("sequence", False)]
)
def test_nemo_rl(stand_in, level, by_token):
    adapter, cfg, logps, data, old, advantages, mask = nemo_case(
        stand_in, sequence_level_importance_ratios=level == "sequence", token_level_loss=by_token
    )
    seqs, toks = torch.tensor(5.0).double(), torch.tensor(23.0).double()
    loss, logged = adapter.R2VPOLossFn(cfg)(logps, data, seqs, toks)
    samples = data["sample_mask"]
    terms = formula(logps, old, advantages, mask, coef=1.5, level=level)
    if by_token:
        expected = (terms * samples[:, None]).sum() / (toks + 1e-8)
    else:
        expected = (terms.sum(-1) / (mask.sum(-1) + 1e-8) * samples).sum() / (seqs + 1e-8)
    seen = samples[:, None] * mask
    delta = torch.where(mask, logps - old, 0.0).detach()
    if level == "sequence":
        delta = (delta.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)) + 0 * delta
    moment = (seen * delta.expm1() ** 2).sum() / toks
    assert logged["ratio_second_moment"] == pytest.approx(moment.item(), rel=1e-12)
    # 1e-8 beside a length moves a log-ratio below 5, and its exponential below 10, so much.
    (gradient,) = torch.autograd.grad(loss, logps)
    (truth,) = torch.autograd.grad(expected, logps)
    tolerance = 1e-12 if by_token else 1e-6
    torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=tolerance)
    assert logged["loss"] == loss.item() and "gen_kl_error" in logged
    assert all(isinstance(x, float) for x in logged.values())


def test_nemo_rl_on_policy_and_bad_input(stand_in):
    adapter, cfg, logps, data, _, advantages, mask = nemo_case(stand_in, force_on_policy_ratio=True)
    one = torch.ones((), dtype=torch.float64)
    data.pop("prev_logprobs")
    loss, _ = adapter.R2VPOLossFn(cfg)(logps, data, one, one)
    terms = formula(logps, logps.detach(), advantages, mask)
    assert_same(loss * (1 + 1e-8), (terms * data["sample_mask"][:, None]).sum(), logps)
    cfg.force_on_policy_ratio = False
    with pytest.raises(ValueError, match="prev_logprobs: got None"):
        adapter.R2VPOLossFn(cfg)(logps, data, one, one)
    data["prev_logprobs"] = data["advantages"]
    for change, match in (
        ({"center": "group"}, "center: got 'group'"),
        ({"use_cispo": True}, "use_cispo: got True"),
        ({"disable_ppo_ratio": True}, "disable_ppo_ratio: got True"),
        ({"ratio_clip_c": 3.0}, "ratio_clip_c: got 3.0"),
        ({"policy_loss": "clip"}, "policy_loss: got 'clip', expected it unset"),
    ):
        with pytest.raises(ValueError, match=match):
            adapter.R2VPOLossFn(Namespace(**vars(cfg) | change))(logps, data, one, one)


# prime-rl


@dataclasses.dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclasses.dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@pytest.fixture
def prime_rl(stand_in):
    loss = {"LossInputs": LossInputs, "LossOutputs": LossOutputs}
    return stand_in("prime_rl", prime_rl__trainer__rl__loss=loss).r2vpo_loss_fn


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_prime_rl(prime_rl, level, weighted):
    """One call a sample; the sum over samples, divided outside, is the packed batch's loss."""
    logps, old, advantages, mask, ref = case(4, 7, seed=2)
    weights = 0.5 + torch.rand(4, 7, dtype=torch.float64)
    losses = []
    for i in range(4):
        given = LossInputs(logps[i], old[i], ref[i], advantages[i], mask[i])
        if weighted:
            given.loss_weights = weights[i]
        out = prime_rl(given, variance_coef=1.5, ratio_level=level, kl_coef=0.1, kl_estimator="k2")
        assert out.loss.dim() == 0 and all(x.dim() == 0 for x in out.metrics.values())
        assert all(x.isfinite() for x in out.metrics.values())
        losses.append(out.loss)
    r = torch.where(mask, logps, 0.0) - torch.where(mask, ref, 0.0)
    terms = formula(logps, old, advantages, mask, coef=1.5, level=level) + 0.1 * r**2 / 2
    assert_same(sum(losses), (terms * weights if weighted else terms).sum(), logps)


def test_prime_rl_clips_and_weights_the_kl(prime_rl):
    logps, old, advantages, mask, ref = (x[0] for x in case(4, 7, seed=2))
    given = LossInputs(logps, old, ref, advantages, mask)
    out = prime_rl(given, **CLIP, kl_coef=0.1, kl_estimator="k2", kl_unbiased=True)
    r, delta = (torch.where(mask, logps - x, 0.0) for x in (ref, old))
    terms = formula(logps, old, advantages, mask, coef=0.0, clip=CLIP["clip_range"])
    assert_same(out.loss, (terms + 0.1 * delta.exp() * r**2 / 2).sum(), logps)
    assert out.metrics["clip/low"] + out.metrics["clip/high"] > 0


def test_prime_rl_bad_input(prime_rl):
    logps, old, advantages, mask, _ = (x[0] for x in case())
    with pytest.raises(ValueError, match="inference_logprobs: got None"):
        prime_rl(LossInputs(logps, None, None, advantages, mask))
    good = LossInputs(logps, old, None, advantages, mask)
    with pytest.raises(ValueError, match="center: got 'group'"):
        prime_rl(good, center="group")
    with pytest.raises(TypeError, match="variance_coeff: got an unknown keyword"):
        prime_rl(good, variance_coeff=1.0)
    for options in ({"kl_coef": 0.1}, {"kl_unbiased": True}):
        with pytest.raises(ValueError, match="ref_logps: got None"):
            prime_rl(good, **options)
    with pytest.raises(ValueError, match="clip_range: got None, expected ε"):
        prime_rl(good, policy_loss="clip")


# SkyRL


@dataclasses.dataclass
class AlgorithmConfig:
    policy_loss_type: str = "regular"
    loss_reduction: str = "token_mean"
    max_seq_len: int | None = None
    off_policy_correction: object = None


@pytest.fixture
def skyrl(stand_in):
    registry = {}

    def apply_off_policy_correction(loss, old, rollout, mask, config):
        if config is None or rollout is None:
            return loss, mask, {}
        weight = (old - rollout).exp()
        keep = mask * (weight < config)
        return loss * weight, keep, {"is_ratio_mean": 1.0}

    ppo_utils = {
        "apply_off_policy_correction": apply_off_policy_correction,
        "PolicyLossRegistry": Namespace(register=registry.__setitem__),
    }
    adapter = stand_in(
        "skyrl",
        skyrl__backends__skyrl_train__utils__ppo_utils=ppo_utils,
        skyrl__train__config={"AlgorithmConfig": AlgorithmConfig},
    )
    return adapter.R2VPOAlgorithmConfig, registry["r2vpo"]


@pytest.mark.parametrize("cap", [None, 1.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "seq_mean_token_sum_norm"])
def test_skyrl(skyrl, reduction, level, cap):
    """Advantages come divided by the mini-batch's denominator; micro-batches sum to the whole."""
    config_class, loss_fn = skyrl
    logps, old, advantages, mask, rollout = case(4, 6, seed=5)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    denominator = 4 * (lengths if reduction == "sequence_mean" else 50)
    config = config_class(
        loss_reduction=reduction, max_seq_len=50, mini_batch_size=4, variance_coef=1.5,
        ratio_level=level, off_policy_correction=cap,
    )  # fmt: skip
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        loss, logged = loss_fn(
            logps[rows], old[rows], (advantages / denominator)[rows], config=config,
            loss_mask=mask[rows].double(), rollout_logprobs=rollout[rows],
        )  # fmt: skip
        total = total + loss
        assert all(isinstance(x, float) and math.isfinite(x) for x in logged.values())
        assert {"ratio_min", "ratio_max", "ratio_var"} <= set(logged)
    kept, weight = mask, 1.0
    if cap:
        weight = torch.where(mask, (old - rollout).exp(), 0.0)
        kept = mask & (weight < cap)
        assert kept.sum() < mask.sum()
    terms = formula(logps, old, advantages, kept, coef=1.5, level=level, weight=weight)
    assert_same(total, (terms / denominator).sum(), logps)


@pytest.mark.parametrize(("options", "coef"), [({}, 0.5), (CLIP, 0.0)], ids=["ratio", "clip"])
def test_skyrl_by_default(skyrl, options, coef):
    config_class, loss_fn = skyrl
    logps, old, advantages, mask, _ = case(4, 6, seed=5)
    denominator = 4 * mask.sum(-1, keepdim=True).clamp(min=1)
    loss, _ = loss_fn(
        logps, old, advantages / denominator, config=config_class(mini_batch_size=4, **options),
        loss_mask=mask.double(),
    )  # fmt: skip
    terms = formula(logps, old, advantages, mask, coef=coef, clip=options.get("clip_range"))
    assert_same(loss, (terms / denominator).sum(), logps)


def test_skyrl_bad_input(skyrl):
    config_class, loss_fn = skyrl
    logps, old, advantages, mask, _ = case()
    assert config_class().policy_loss_type == "r2vpo"

    def error(match, old=old, **changes):
        config = config_class(**{"mini_batch_size": 3} | changes)
        with pytest.raises(ValueError, match=match):
            loss_fn(logps, old, advantages, config=config, loss_mask=mask)

    error("old_log_probs: got None", old=None)
    error("center: got 'group'", center="group")
    error("mini_batch_size: got 0", mini_batch_size=0)
    error("loss_reduction: got 'token_mean', expected one of 'sequence_mean'",
          loss_reduction="token_mean")  # fmt: skip


# torchtitan


@pytest.fixture(scope="module")
def titan():
    adapter = importlib.import_module("r2vpo_kernels.integrations.torchtitan")
    return adapter.R2VPOLoss, wheel_file("torchtitan", "rl/losses/dapo.py", "dapo").DAPOLoss


def titan_case():
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 6, 9, generator=g).requires_grad_()
    labels = torch.randint(0, 9, (2, 6), generator=g)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    labels[~mask] = -100
    old = -2.0 + 0.3 * torch.randn(2, 6, generator=g)
    old[0, 2], old[1, 3] = NAN, -torch.inf
    advantages = torch.randn(2, 6, generator=g) * mask
    batch = {"generator_logprobs": old, "advantages": advantages, "loss_mask": mask}
    return logits, labels, batch, mask & old.isfinite()


@pytest.mark.parametrize("tokens", [None, 0, 17])
def test_torchtitan(titan, tokens):
    ours, real = titan
    logits, labels, batch, mask = titan_case()
    wide = ours.Config(variance_coef=0.0).build()
    # Logs of ratios stay below the real loss's own clamp.
    unclipped = real.Config(ratio_clip_low=1e9, ratio_clip_high=1e9).build()
    coefs = (wide, 0.0, unclipped), (ours.Config(variance_coef=1.5).build(), 1.5, None)
    for loss_fn, coef, theirs in coefs:
        loss, logged = loss_fn(logits, labels, tokens, **batch)
        log_p = logits.double().log_softmax(-1)
        logps = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        old, advantages = batch["generator_logprobs"].double(), batch["advantages"].double()
        expected = formula(logps, old, advantages, mask, coef=coef).sum() / max(tokens or 1, 1)
        (gradient,) = torch.autograd.grad(loss, logits)
        (truth,) = torch.autograd.grad(expected, logits)
        # float32: ten terms below 10, each of some ten roundings.
        close = {"rtol": 0, "atol": 1000 * 2**-24}
        torch.testing.assert_close(loss, expected.float(), **close)
        torch.testing.assert_close(gradient, truth, **close)
        assert truth.abs().max() > 100 * close["atol"]
        assert all(x.dim() == 0 and x.isfinite() for x in logged.values())
        assert logged["loss/mean"] == loss
        if theirs is not None:
            loss, metrics = theirs(logits, labels, tokens, **batch)
            torch.testing.assert_close(loss, expected.float(), **close)
            ratio = "loss/ratio_mean"
            torch.testing.assert_close(logged[ratio], metrics[ratio], **close)


def test_torchtitan_clipped_is_dapo(titan):
    ours, real = titan
    logits, labels, batch, _ = titan_case()
    theirs = real.Config(ratio_clip_low=0.1, ratio_clip_high=0.2).build()
    results = [f(logits, labels, 17, **batch) for f in (ours.Config(**CLIP).build(), theirs)]
    (loss, logged), (expected, _) = results
    close = {"rtol": 0, "atol": 1000 * 2**-24}
    torch.testing.assert_close(loss, expected, **close)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, **close)
    assert logged["loss/clip_low_frac"] + logged["loss/clip_high_frac"] > 0


def test_torchtitan_in_chunks(titan):
    """The trainer's ChunkedLossWrapper cuts all inputs along the sequence and sums."""
    from torchtitan.components.loss import ChunkedLossWrapper

    loss_fn = titan[0].Config(variance_coef=1.5, log_ratio_clamp=0.3)
    logits, labels, batch, _ = titan_case()
    torch.manual_seed(0)
    head = torch.nn.Linear(9, 9, bias=False)
    wrapper = ChunkedLossWrapper.Config(num_chunks=3, loss_fn=loss_fn).build()
    wrapper.set_lm_head(head)
    hidden = logits.detach().requires_grad_()
    loss, logged = wrapper(hidden, labels, 8, **batch)
    loss.backward()
    grads = hidden.grad.clone(), head.weight.grad.clone()
    whole, expected = loss_fn.build()(head(logits), labels, 8, **batch)
    truth = torch.autograd.grad(whole, [logits, head.weight])
    close = {"rtol": 0, "atol": 1000 * 2**-24}
    torch.testing.assert_close(loss, whole, **close)
    torch.testing.assert_close(grads, truth, **close)
    torch.testing.assert_close(logged, expected, **close)
    assert 0 < expected["loss/ratio_clamped_frac"] < 1


def test_torchtitan_bad_input(titan):
    ours, _ = titan
    logits, labels, batch, _ = titan_case()
    with pytest.raises(ValueError, match="generator_logprobs: got None"):
        ours.Config().build()(logits, labels, **batch | {"generator_logprobs": None})
    with pytest.raises(ValueError, match="center: got 'group'"):
        ours.Config(center="group").build()(logits, labels, **batch)
    with pytest.raises(ValueError, match="ratio_level: got 'sequence', expected one of 'token'"):
        ours.Config(ratio_level="sequence").build()


# All of them


def test_the_package_imports_no_framework():
    code = (
        "import sys, r2vpo_kernels, r2vpo_kernels.integrations\n"
        f"found = [n for n in {FRAMEWORKS} if n in sys.modules]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_those_of_the_loss():
    from r2vpo_kernels.integrations.hook import Settings

    signature = inspect.signature(r2vpo_loss).parameters
    for field in dataclasses.fields(Settings):
        assert field.default == signature[field.name].default


@pytest.mark.parametrize(
    ("adapter", "package"),
    [(name, name.replace("_", "-")) for name in FRAMEWORKS[:-1]],
)
def test_an_incompatible_version_is_named(monkeypatch, adapter, package):
    name = f"r2vpo_kernels.integrations.{adapter}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "99.1" if n == package else "0")
    with pytest.raises(
        ImportError, match=rf"{package}: got version 99\.1, expected at least 0\.\d"
    ):
        importlib.import_module(name)


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("1.16.0", True), ("1.16", True), ("1.16.9.post1", True), ("1.16.0rc1", True),
        ("1.9.0", False), ("1.17.0", False), ("1.17.0.dev3", False), ("1.160", False),
        ("2", False), ("unknown", False),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(monkeypatch, found, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    if fits:
        check_version("trl", "1.16", "1.17")
    else:
        with pytest.raises(ImportError, match=f"trl: got version {found}, .*1.16 and below 1.17"):
            check_version("trl", "1.16", "1.17")


def test_a_checkout_names_its_version_itself(monkeypatch):
    module = types.ModuleType("some_trainer")
    module.__version__ = "0.3.1"
    monkeypatch.setitem(sys.modules, "some_trainer", module)
    check_version("some-trainer", "0.3", "0.4")
    with pytest.raises(ImportError, match=r"got version 0\.3\.1, expected at least 0\.4"):
        check_version("some-trainer", "0.4", "0.5")
    with pytest.raises(ImportError, match="no-trainer: got version none"):
        check_version("no-trainer", "0.1", "0.2")
