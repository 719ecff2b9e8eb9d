"""NeMo-RL: its contract, what a LossFunction is given and calls."""

from argparse import Namespace

import pytest
import torch
from support.trainers import assert_same, case, formula


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
