"""ms-swift: its own GRPOTrainer, its configuration and factory, from its wheel.

It changes TRL's classes and those of transformers as it is imported: all runs in one other process.
"""

import dataclasses
import math
import multiprocessing
import sys
import types
import warnings
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from support.trainers import Stubs, assert_same

# Its imports alone take ten seconds.
pytestmark = pytest.mark.slow

STUBS = ("dacite", "einops", "json_repair", "modelscope", "msgspec", "torchvision")
ROWS, LENGTH, MAX_LENGTH, TOKENS, RANKS = 4, 6, 9, 31, 2
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def load():
    torch.use_deterministic_algorithms(True)
    sys.meta_path.insert(0, Stubs(*STUBS))
    # ms-swift asks for TRL below 1.0, which had these.
    for name in ("CPO", "GKD", "ORPO", "PPO"):
        module = types.ModuleType(f"trl.experimental.{name.lower()}")
        for kind in ("Config", "Trainer"):
            setattr(module, name + kind, type(name + kind, (), {}))
        sys.modules[module.__name__] = module


@pytest.fixture(scope="module")
def elsewhere():
    """A function that runs another with its arguments in the process that has ms-swift."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, context, load) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def batch(seed=0):
    """(log-probs, a GRPOBatch) in float64; a sequence is truncated, padding holds -1e10."""
    from swift.rl_core.data import GRPOBatch

    g = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return scale * torch.randn(ROWS, LENGTH, generator=g, dtype=torch.float64)

    mask = torch.arange(LENGTH) < torch.tensor([6, 3, 5, 2])[:, None]
    old = -draw().abs() - 0.1
    logps = [torch.where(mask, x, -1e10) for x in (old + draw(0.3), old, old + draw(0.2))]
    rollout = torch.where(mask, old + draw(0.2), 0.0)
    advantages = torch.tensor([[-1.0], [0.5], [2.0], [-0.3]]).double().expand(ROWS, LENGTH)
    data = GRPOBatch(
        completion_mask=mask, truncated_mask=torch.tensor([False, False, True, False]),
        seq_lengths=torch.full((ROWS,), LENGTH), old_per_token_logps=logps[1],
        ref_per_token_logps=logps[2], rollout_per_token_logps=rollout, advantages=advantages,
        num_items_in_batch=torch.tensor(TOKENS), logits_to_keep=LENGTH,
    )  # fmt: skip
    return logps[0].requires_grad_(), data


def light_init(self, args):
    """What ms-swift's __init__ gives its loss, but for models and data."""
    self.args = args
    self._prepare_algorithm_params()
    self.beta, self.max_completion_length = args.beta, MAX_LENGTH
    self.model = torch.nn.Module()
    self.template = Namespace(padding_free=False)
    self.accelerator = Namespace(
        num_processes=RANKS, device=torch.device("cpu"), gather_for_metrics=torch.atleast_1d,
        is_main_process=True,
    )  # fmt: skip
    self.dynamic_num_samples, self._has_teacher = False, False
    self.disable_rollout_importance_sampling = False
    self.chord_sft_iterator = self.compute_loss_func = None
    self.model_accepts_loss_kwargs, self.current_gradient_accumulation_steps = False, 3
    self.state = Namespace(global_step=7)
    self._prepare_liger_loss()
    self._prepare_metrics()


def arguments(**options):
    from swift.rlhf_trainers.arguments import GRPOConfig

    basics = {"output_dir": "unused", "num_generations": 2, "use_cpu": True, "bf16": False,
              "per_device_train_batch_size": ROWS, "beta": 0.0, "loss_type": "grpo",
              "kl_in_reward": False, "report_to": []}  # fmt: skip
    return GRPOConfig(**(basics | options))


def trainer(settings=None, **options):
    """The adapter's trainer with these settings, or without them ms-swift's."""
    from swift.rlhf_trainers import grpo_trainer

    from r2vpo_kernels.integrations import ms_swift

    kind = grpo_trainer.GRPOTrainer
    if settings is not None:
        ms_swift.register(**settings)
        kind = ms_swift.R2VPOTrainer
    with (
        mock.patch.object(grpo_trainer.GRPOTrainer, "__init__", light_init),
        mock.patch.object(grpo_trainer, "JsonlWriter"),
    ):
        return kind(args=arguments(**options))


def loss_of(trainer, logps, data):
    """By ms-swift's `compute_loss`, with log-probs in the model's place, and entropies."""
    entropies = logps.detach().abs()
    trainer._get_per_token_logps_and_entropies_single = lambda *a, **k: (logps, entropies)
    inputs = {"model_inputs": {"input_ids": torch.zeros(len(logps), 1)}, "grpo_batch": data}
    with mock.patch("swift.rlhf_trainers.grpo_trainer.gather_object", lambda x: x):
        return trainer.compute_loss(trainer.model, inputs)


def token_weights(loss_type, mask):
    """What each token's loss is multiplied by."""
    mask = mask.double()
    weights = {
        "grpo": 1 / (ROWS * mask.sum(-1, keepdim=True).clamp(min=1)),
        "bnpo": 1 / mask.sum(),
        "dr_grpo": 1 / (ROWS * MAX_LENGTH),
        # Of the whole window, on this rank; the Trainer divides by the micro-batches again.
        "dapo": RANKS * 3 / TOKENS,
        "cispo": RANKS * 3 / TOKENS,
    }
    return mask * weights[loss_type]


def masked_delta(logps, old, mask, level="token"):
    delta = torch.where(mask, logps - old, 0.0)
    if level != "token":
        delta = delta.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1) + 0 * delta
    return delta


def formula_case(loss_type, level, anchor):
    logps, data = batch()
    vllm = {"use_vllm": True} if anchor == "rollout" else {}
    tried = trainer({"variance_coef": 1.5, "anchor": anchor}, loss_type=loss_type,
                    importance_sampling_level=level, **vllm)  # fmt: skip
    loss = loss_of(tried, logps, data)
    mask = data.completion_mask
    old = {"old": data.old_per_token_logps, "rollout": data.rollout_per_token_logps}[anchor]
    ratio = masked_delta(logps, old, mask, level).exp()
    terms = -data.advantages * ratio + 1.5 * (ratio - 1) ** 2
    assert_same(loss, (token_weights(loss_type, mask) * terms).sum(), logps)
    assert ((ratio - 1).abs() > 0.3).any()  # outside of ms-swift's clip


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("anchor", ["old", "rollout"])
def test_the_loss_is_the_formula(elsewhere, loss_type, level, anchor):
    elsewhere(formula_case, loss_type, level, anchor)


KEPT = {
    "kl": {"beta": 0.1},
    "truncated": {"overlong_filter": True},
    "off policy": {"off_policy_sequence_mask_delta": 0.0},
    "corrected": {"rollout_importance_sampling_mode": "token_truncate",
                  "rollout_importance_sampling_threshold": 1.1},
    "entropy": {"top_entropy_quantile": 0.5},
    "gspo": {"importance_sampling_level": "sequence_token"},
    "delta": {"delta": 1.2, "epsilon": 0.1, "epsilon_high": 0.15},
}  # fmt: skip


def kept_case(name, loss_type, policy_loss):
    """ms-swift's own loss, and the penalty on the tokens that it keeps."""
    logps, data = batch()
    options = KEPT[name] | {"loss_type": loss_type}
    own = trainer(**options)
    expected = loss_of(own, logps, data)
    tried = trainer({"policy_loss": policy_loss}, **options)
    assert_same(loss_of(tried, logps, data), expected, logps)
    penalised = trainer({"policy_loss": policy_loss, "variance_coef": 0.7}, **options)
    loss = loss_of(penalised, logps, data)
    mask = data.completion_mask
    if name == "truncated":
        mask = mask & ~data.truncated_mask[:, None]
    if name == "off policy":
        drift = masked_delta(data.rollout_per_token_logps, logps, mask, "sequence")
        kept = ~((drift > 0) & (data.advantages < 0))
        assert not kept.all()
        mask = mask & kept
    level = options.get("importance_sampling_level", "token")
    ratio = masked_delta(logps, data.old_per_token_logps, mask, level).exp()
    penalty = (token_weights(loss_type, mask) * 0.7 * (ratio - 1) ** 2).sum()
    assert_same(loss, expected + penalty, logps)
    metrics = [dict(t._metrics["train"]) for t in (own, penalised)]
    assert metrics[0] == metrics[1] != {}


@pytest.mark.parametrize(
    ("loss_type", "policy_loss"), [(t, "clip") for t in LOSS_TYPES] + [("cispo", "cispo")]
)
@pytest.mark.parametrize("name", KEPT)
def test_what_is_ms_swifts_stays(elsewhere, name, loss_type, policy_loss):
    elsewhere(kept_case, name, loss_type, policy_loss)


def dual_case(folder):
    """λ by all micro-batches of an optimizer step, on the way through a checkpoint."""
    from swift.trainers import SwiftMixin
    from trl import GRPOTrainer

    from r2vpo_kernels.integrations import ms_swift

    settings = {"variance_target": 0.2, "variance_coef": 0.3}
    tried = trainer(settings, loss_type="bnpo")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    sums = torch.zeros(2)
    for seed in range(3):
        logps, data = batch(seed)
        tried.model.eval()
        with torch.no_grad():
            loss_of(tried, logps.detach(), data)
        tried.model.train()
        (loss_of(tried, logps, data) / 3).backward()
        mask = data.completion_mask
        d = masked_delta(logps, data.old_per_token_logps, mask).detach().expm1()
        sums += torch.stack([mask.sum(), (d**2).sum()])
    optimizer.step()
    v = (sums[1] / sums[0]).item()
    # float32 sums.
    coef = pytest.approx(0.3 * math.exp(0.1 * min(v / 0.2 - 1, 1)), rel=1e-5)
    assert tried._optimizer_steps.constraint.coef.item() == coef != 0.3
    logged = {}
    with mock.patch.object(SwiftMixin, "log", lambda self, logs, start_time: None):
        tried.log_completions = False
        tried.log(logged)
    assert logged["r2vpo/variance_coef"] == coef and logged["r2vpo/step/ratio_var"] > 0

    tried.args.output_dir = str(folder)
    tried._update_last_checkpoint_symlink = lambda: None
    with (
        mock.patch.object(GRPOTrainer, "_save_checkpoint"),
        mock.patch.object(GRPOTrainer, "_load_optimizer_and_scheduler"),
    ):
        tried._save_checkpoint(tried.model, None)
        checkpoint = str(folder / "checkpoint-7")
        resumed = trainer(settings)
        resumed.args.deepspeed = None
        resumed._load_optimizer_and_scheduler(None)
        assert resumed._optimizer_steps.constraint.coef.item() == pytest.approx(0.3, rel=1e-6)
        resumed._load_optimizer_and_scheduler(checkpoint)
        assert resumed._optimizer_steps.constraint.coef.item() == coef
        only_model = trainer(settings)
        only_model.args.resume_only_model = True
        only_model._load_optimizer_and_scheduler(checkpoint)
        assert only_model._optimizer_steps.constraint.coef.item() == pytest.approx(0.3, rel=1e-6)
    assert ms_swift.R2VPOTrainer.settings.variance_target == 0.2


def test_the_dual_moves_by_optimizer_steps_and_is_saved(elsewhere, tmp_path):
    elsewhere(dual_case, tmp_path)


def chunks_case():
    """One more chunk than this rank has sequences, as another rank may need: it counts nothing."""
    logps, data = batch()
    tried = trainer({"variance_coef": 0.7})
    tried.dynamic_num_samples, tried.is_multimodal = True, False
    tried.args.per_device_train_batch_size = 1
    rows = []

    def scored(model, model_inputs, grpo_batch, **kwargs):
        (row,) = model_inputs["input_ids"][:, 0].tolist()
        rows.append(row)
        return logps[row : row + 1], None

    tried._get_per_token_logps_and_entropies_single = scored
    inputs = {"model_inputs": {"input_ids": torch.arange(ROWS)[:, None]}, "grpo_batch": data}
    own = [ROWS]
    with mock.patch(
        "swift.rlhf_trainers.grpo_trainer.gather_object",
        lambda x: [*x, ROWS + 1] if x == own else [*x, False] if x == [False] else x,
    ):
        loss = tried.compute_loss(tried.model, inputs)
    loss.backward()
    assert rows == [0, 1, 2, 3, 3]
    tried._optimizer_steps.close()
    stats, mask = tried._optimizer_steps.last, data.completion_mask
    d = masked_delta(logps, data.old_per_token_logps, mask).detach().expm1()
    # Of "grpo" a sequence weighs one.
    weights = mask / mask.sum(-1, keepdim=True)
    assert stats.weight.item() == pytest.approx(ROWS, rel=1e-6)
    assert stats.d_sum.item() == pytest.approx((weights * d).sum().item(), rel=1e-5)


def test_repeated_chunks_do_not_count(elsewhere):
    elsewhere(chunks_case)


def warning_case():
    tried = trainer({})
    logps, data = batch()
    data = dataclasses.replace(data, old_per_token_logps=None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(4):
            loss_of(tried, logps, data).backward()
            tried._optimizer_steps.close()
    (warning,) = [str(w.message) for w in seen if "importance ratio" in str(w.message)]
    assert 'anchor="rollout"' in warning and "--num_iterations" in warning


def test_a_penalty_without_effect_is_told(elsewhere):
    elsewhere(warning_case)


REFUSED = [
    ({}, {"loss_type": "sapo"}, "loss_type: got 'sapo', expected one of grpo, bnpo, dr_grpo, dapo"),
    ({"policy_loss": "cispo"}, {}, "loss_type: got 'grpo', expected one of cispo"),
    ({}, {"epsilon_high": 0.28}, "epsilon_high: got 0.28"),
    ({}, {"delta": 2.0}, "delta: got 2.0"),
    ({}, {"chord_sft_dataset": ["x"]}, "chord_sft_dataset: got "),
    ({"anchor": "rollout"}, {}, "anchor: got 'rollout', expected 'old': without use_vllm"),
    ({"anchor": "rollout"},
     {"use_vllm": True, "rollout_importance_sampling_mode": "token_mask"},
     "rollout_importance_sampling_mode: got 'token_mask'"),
    ({"anchor": "rollout"}, {"use_vllm": True, "log_rollout_offpolicy_metrics": True},
     "log_rollout_offpolicy_metrics: got True"),
    ({"anchor": "new"}, {}, "anchor: got 'new', expected one of 'old', 'rollout'"),
    ({"policy_loss": "ppo"}, {}, "policy_loss: got 'ppo', expected one of 'ratio', 'clip'"),
    ({"variance_coef": -1.0}, {}, "variance_coef: got -1.0"),
    ({"variance_target": 0.0}, {}, "variance_target: got 0.0"),
    ({"variance_target": 0.1, "variance_coef_min": 0.0}, {}, "variance_coef_min: got 0.0"),
]  # fmt: skip


def refused_case(settings, options, message):
    with pytest.raises(ValueError) as caught:
        trainer(settings, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("settings", "options", "message"), REFUSED)
def test_bad_options_are_refused(elsewhere, settings, options, message):
    elsewhere(refused_case, settings, options, message)


def registration_case(folder):
    """By ms-swift's own import of plugins, and its factory."""
    from swift.trainers import TrainerFactory
    from swift.utils.utils import import_external_file

    from r2vpo_kernels.integrations import ms_swift

    plugin = folder / "r2vpo_plugin.py"
    plugin.write_text(
        "from r2vpo_kernels.integrations.ms_swift import register\n\nregister(variance_coef=0.25)\n"
    )
    TrainerFactory.TRAINER_MAPPING["grpo"] = "swift.rlhf_trainers.GRPOTrainer"
    import_external_file(str(plugin))
    assert TrainerFactory.get_trainer_cls(Namespace(rlhf_type="grpo")) is ms_swift.R2VPOTrainer
    assert ms_swift.R2VPOTrainer.settings == ms_swift.R2VPOSettings(variance_coef=0.25)
    with pytest.raises(TypeError, match="varianc_coef"):
        ms_swift.register(varianc_coef=1.0)
    with (
        mock.patch.dict(sys.modules, {"swift.megatron": types.ModuleType("swift.megatron")}),
        pytest.raises(RuntimeError, match="r2vpo: got Megatron's trainer"),
    ):
        ms_swift.register()
    old_vllm = {"disable_rollout_importance_sampling": True}
    with (
        mock.patch.object(sys.modules[__name__], "light_init", partly(light_init, old_vllm)),
        pytest.raises(ValueError, match="anchor: got 'rollout', expected 'old': before 0"),
    ):
        trainer({"anchor": "rollout"}, use_vllm=True)
    logps, data = batch()
    tried = trainer({"anchor": "rollout"}, use_vllm=True)
    data = dataclasses.replace(data, rollout_per_token_logps=None)
    with pytest.raises(ValueError, match="rollout_per_token_logps: got None, expected log-probs"):
        loss_of(tried, logps, data)


def partly(init, attributes):
    def changed(self, args):
        init(self, args)
        vars(self).update(attributes)

    return changed


def test_a_plugin_registers_it(elsewhere, tmp_path):
    elsewhere(registration_case, tmp_path)
