"""NeMo-RL: its contract, what a LossFunction is given and calls."""

import enum
import math
import pickle

import pytest
import torch
from pydantic import BaseModel
from support.trainers import assert_same, case, formula


class LossType(enum.Enum):
    TOKEN_LEVEL, SEQUENCE_LEVEL = "token_level", "sequence_level"


class MetricNormalizer(enum.Enum):
    """After 0.7."""

    TOKENS, SEQUENCES, NONE = "tokens", "sequences", "none"


class ClippedPGLossConfig(BaseModel, extra="allow"):
    disable_ppo_ratio: bool = False
    ratio_clip_c: float | None = None
    use_cispo: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    force_on_policy_ratio: bool = False
    sequence_level_importance_ratios: bool = False
    token_level_loss: bool = True
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None


def masked_mean(values, mask, dim=None, global_normalization_factor=None):
    n = global_normalization_factor
    n = torch.sum(mask, dim=dim) if n is None else n
    return torch.sum(values * mask, dim=dim) / (n + 1e-8)


class ClippedPGLossFn:
    """The surrogate, clipped on both sides of the ratio, with the importance-sampling correction
    from the engine to prev_logprobs."""

    def __init__(self, cfg):
        self.ratio_clip_min, self.ratio_clip_max = cfg.ratio_clip_min, cfg.ratio_clip_max
        self.force_on_policy_ratio = cfg.force_on_policy_ratio
        self.sequence_level_importance_ratios = cfg.sequence_level_importance_ratios
        self.correct = cfg.use_importance_sampling_correction
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
        if self.correct:
            loss = loss * (prev - data["generation_logprobs"][:, 1:]).exp()
        if self.loss_type == LossType.TOKEN_LEVEL:
            loss = masked_mean(loss, mask, None, global_valid_toks)
        else:
            rows = masked_mean(loss, token_mask, -1)
            loss = masked_mean(rows, samples, None, global_valid_seqs)
        return loss, {"loss": loss.item(), "gen_kl_error": 0.0, "token_mult_prob_error": 1.0}


class LaterClippedPGLossFn(ClippedPGLossFn):
    """What it has after 0.7."""

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        super().__init__(cfg)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        token = self.loss_type == LossType.TOKEN_LEVEL
        by_gradient = MetricNormalizer.TOKENS if token else MetricNormalizer.SEQUENCES
        self.metric_normalizations = {
            "loss": by_gradient,
            "gen_kl_error": MetricNormalizer.TOKENS,
            "token_mult_prob_error": MetricNormalizer.TOKENS,
        }


@pytest.fixture
def load(stand_in):
    def load(loss_fn=ClippedPGLossFn):
        interfaces = {"LossType": LossType, "MetricNormalizer": MetricNormalizer}
        return stand_in(
            "nemo_rl",
            nemo_rl__algorithms__loss__interfaces=interfaces,
            nemo_rl__algorithms__loss__loss_functions={"ClippedPGLossFn": loss_fn},
            nemo_rl__algorithms__utils={"masked_mean": masked_mean},
        ).R2VPOLossFn

    return load


def config(**changes):
    return ClippedPGLossConfig(**{"variance_coef": 1.5} | changes)


def nemo_case():
    logps, old, advantages, mask, rollout = (x.detach().nan_to_num() for x in case(4, 6, seed=3))
    mask = mask.bool()
    mask[1] = True

    def full(x):
        return torch.cat([torch.full_like(x[:, :1], 7.0), x], 1)

    data = {
        "token_mask": full(mask.double()),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
        "prev_logprobs": full(old),
        "generation_logprobs": full(rollout),
        "advantages": full(advantages),
    }
    return logps.requires_grad_(), data, old, rollout, advantages, mask


SEQS, TOKS = torch.tensor(5.0).double(), torch.tensor(23.0).double()


def aggregated(terms, mask, samples, by_token):
    if by_token:
        return (terms * samples[:, None]).sum() / (TOKS + 1e-8)
    return (terms.sum(-1) / (mask.sum(-1) + 1e-8) * samples).sum() / (SEQS + 1e-8)


@pytest.mark.parametrize("anchor", ["old", "rollout"])
@pytest.mark.parametrize(
    ("level", "by_token"), [("token", True), ("token", False), ("sequence", False)]
)
def test_nemo_rl(load, level, by_token, anchor):
    """To the engine's log-probs the correction between them and prev_logprobs, which NeMo-RL wants
    of asynchronous runs, counts nothing twice."""
    logps, data, old, rollout, advantages, mask = nemo_case()
    by_sequence = level == "sequence"
    loss_fn = load()(
        config(
            sequence_level_importance_ratios=by_sequence, token_level_loss=by_token, anchor=anchor,
            use_importance_sampling_correction=anchor == "rollout",
        )
    )  # fmt: skip
    loss, logged = loss_fn(logps, data, SEQS, TOKS)
    old, samples = rollout if anchor == "rollout" else old, data["sample_mask"]
    terms = formula(logps, old, advantages, mask, coef=1.5, level=level)
    expected = aggregated(terms, mask, samples, by_token)
    seen = samples[:, None] * mask
    delta = torch.where(mask, logps - old, 0.0).detach()
    if by_sequence:
        delta = (delta.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)) + 0 * delta
    moment = (seen * delta.expm1() ** 2).sum() / TOKS
    assert logged["ratio_second_moment"] == pytest.approx(moment.item(), rel=1e-12)
    # 1e-8 beside a length moves a log-ratio below 5, and its exponential below 10, so much.
    (gradient,) = torch.autograd.grad(loss, logps)
    (truth,) = torch.autograd.grad(expected, logps)
    tolerance = 1e-12 if by_token else 1e-6
    torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=tolerance)
    assert logged["loss"] == loss.item() and "gen_kl_error" in logged
    assert all(isinstance(x, float) for x in logged.values())


def test_nemo_rl_skips_the_recomputation(load):
    """With force_on_policy_ratio NeMo-RL puts zeros for prev_logprobs."""
    logps, data, _, rollout, advantages, mask = nemo_case()
    data["prev_logprobs"] = torch.zeros_like(data["prev_logprobs"])
    loss_fn = load()(config(force_on_policy_ratio=True, anchor="rollout"))
    loss, _ = loss_fn(logps, data, SEQS, TOKS)
    terms = formula(logps, rollout, advantages, mask, coef=1.5)
    assert_same(loss, aggregated(terms, mask, data["sample_mask"], True), logps)


def test_nemo_rl_without_penalty_on_policy(load):
    logps, data, _, _, advantages, mask = nemo_case()
    data.pop("prev_logprobs")
    loss, _ = load()(config(force_on_policy_ratio=True, variance_coef=0.0))(logps, data, SEQS, TOKS)
    terms = formula(logps, logps.detach(), advantages, mask)
    assert_same(loss, aggregated(terms, mask, data["sample_mask"], True), logps)


@pytest.mark.parametrize("by_token", [True, False])
def test_nemo_rl_after_0_7(load, by_token):
    """The keyword of fused log-probs goes to NeMo-RL's loss; every metric names its denominator."""
    logps, data, *_ = nemo_case()
    loss_fn = load(LaterClippedPGLossFn)(
        config(token_level_loss=by_token, variance_target=0.1), use_fused_linear_logprobs=True
    )
    assert loss_fn.use_fused_linear_logprobs
    denominators = {
        MetricNormalizer.TOKENS: torch.tensor(23.0), MetricNormalizer.SEQUENCES: torch.tensor(5.0)
    }  # fmt: skip
    one = torch.ones((), dtype=torch.float64)
    loss, _ = loss_fn(logps, data, SEQS, TOKS)
    loss.backward()
    _, normal = loss_fn(logps, data, SEQS, TOKS)
    _, of_sums = loss_fn(logps, data, one, one)
    assert {"variance_coef", "step/ratio_var", "variance_penalty"} < set(normal)
    for name in set(normal) - {"gen_kl_error", "token_mult_prob_error"}:
        later = of_sums[name] / denominators[loss_fn.metric_normalizations[name]].item()
        assert later == pytest.approx(normal[name], rel=1e-7), name


def test_nemo_rl_dual(load):
    """The loss goes to its worker by pickle. There the second of two micro-batches is repeated to
    fill the rank, and its loss multiplied by 0; λ is logged by shares of the tokens."""
    logps, data, old, _, _, mask = nemo_case()
    driver = load()(config(variance_target=0.2, variance_coef=0.7))
    loss_fn = pickle.loads(pickle.dumps(driver))
    optimizer = torch.optim.SGD([logps], lr=0.01)
    samples, coef = data["sample_mask"], 0.7
    tokens = (mask * samples[:, None]).sum()
    for _ in range(2):
        seen = (mask * samples[:, None]).bool()
        d = torch.where(seen, logps.detach() - old, 0.0).expm1()
        v = (d.square().sum() / seen.sum()).item()
        assert 0.05 < abs(v / 0.2 - 1) < 0.9
        logged = 0.0
        for rows, factor in ((slice(0, 1), 2), (slice(1, 4), 2), (slice(1, 4), 0)):
            part = {name: x[rows] for name, x in data.items()}
            loss, metrics = loss_fn(logps[rows], part, SEQS, tokens)
            loss *= factor
            loss.backward()
            logged += metrics["variance_coef"] * (factor > 0)
            with torch.no_grad():
                loss_fn(logps[rows], part, SEQS, tokens)
        assert logged == pytest.approx(coef, rel=1e-6)
        optimizer.step()
        coef *= math.exp(0.1 * min(v / 0.2 - 1, 1))
        assert loss_fn.steps.constraint.coef.item() == pytest.approx(coef, rel=1e-6)


def test_nemo_rl_names_the_setting_where_every_ratio_is_one(load):
    """One optimizer step per batch, as in grpo_math_1B.yaml."""
    logps, data, *_ = nemo_case()
    loss_fn = load()(config())
    optimizer = torch.optim.SGD([logps], lr=0.1)
    with pytest.warns(UserWarning, match=r"exactly 1.*loss_fn\.anchor: rollout"):
        for _ in range(4):
            data["prev_logprobs"] = torch.cat([logps[:, :1], logps], 1).detach()
            loss, _ = loss_fn(logps, data, SEQS, TOKS)
            loss.backward()
            optimizer.step()


def test_nemo_rl_bad_input(load):
    loss_fn = load()
    for change, match in (
        ({"center": "group"}, "center: got 'group'"),
        ({"use_cispo": True}, "use_cispo: got True"),
        ({"disable_ppo_ratio": True}, "disable_ppo_ratio: got True"),
        ({"ratio_clip_c": 3.0}, "ratio_clip_c: got 3.0"),
        ({"policy_loss": "clip"}, "policy_loss: got 'clip', expected it unset"),
        ({"ratio_level": "sequence"}, "ratio_level: got 'sequence', expected it unset"),
        ({"anchor": "engine"}, "anchor: got 'engine', expected one of 'old', 'rollout'"),
        ({"force_on_policy_ratio": True}, "force_on_policy_ratio: got True, expected False, or"),
        (
            {"anchor": "rollout", "truncated_importance_sampling_type": "tis"},
            "truncated_importance_sampling_type: got 'tis', expected it unset",
        ),
        ({"variance_coef": -1.0}, "variance_coef: got -1"),
        ({"variance_target": 0.1, "variance_coef_max": 1.0}, "variance_coef: got 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            loss_fn(config(**change))
    with pytest.raises(TypeError, match="variance_coeff: got an unknown key, expected one of"):
        loss_fn(config(variance_coeff=1.0))
    logps, data, *_ = nemo_case()
    for name, anchor in (("prev_logprobs", "old"), ("generation_logprobs", "rollout")):
        lacking = {key: x for key, x in data.items() if key != name}
        with pytest.raises(ValueError, match=f"{name}: got None"):
            loss_fn(config(anchor=anchor))(logps, lacking, SEQS, TOKS)


def test_nemo_rl_names_what_it_lacks(load):
    class Earlier(ClippedPGLossFn):
        def __call__(self, next_token_logits, data, global_valid_seqs, global_valid_toks):
            pass

    class Renamed(ClippedPGLossFn):
        def __init__(self, cfg):
            super().__init__(cfg)
            del self.ratio_clip_max

    with pytest.raises(ImportError, match=r"0\.7\.0, .* without the parameter next_token_logprobs"):
        load(Earlier)
    with pytest.raises(ImportError, match=r"R2VPOLossFn without ratio_clip_max; .* tested with"):
        load(Renamed)(config())
