"""R2VPOTrainer in the real TRL: its loss and gradients against TRL's own GRPO and against formulas
written out here, what it carries from generation to loss, λ, checkpoints, two ranks, bad input.

The models are tiny, random and in float64, with log-probs from whole float64 logits where TRL's
kernel would round them to float32. So two ways to the same loss differ by the order of sums alone.
"""

import functools
import importlib
import math
import os
import warnings

# Before TRL is imported: nothing is to be fetched, nothing reported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.ranks import run_on
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)
from trl.trainer.utils import split_tensor_dict as split

from r2vpo_kernels import VarianceConstraint, r2vpo_loss_from_logps
from r2vpo_kernels.integrations import trl as integration
from r2vpo_kernels.integrations.trl import R2VPOConfig, R2VPOTrainer, pool_metrics

WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(10))]
V, PROMPT, T, GROUP = len(WORDS), 4, 6, 4
# The largest number of terms that a sum here has (tokens of a batch times vocabulary), each of
# which may be rounded; what a gradient is compared with is the largest of all gradients.
TERMS = 16 * T * V
TEMPERATURE = 0.7
F64, F32 = TERMS * 2.0**-53, TERMS * 2.0**-24
SIZES = {"vocab_size": V, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = SIZES | {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
# GPT-2 has no float32 within.
GPT2 = GPT2Config(
    **SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0,
    attn_pdrop=0, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_model(config=GPT2):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    # Far from uniform, so that log-probs, entropies and gradients are not all alike.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@functools.cache
def new_tokenizer():
    vocabulary = models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


@functools.cache
def dataset():
    return Dataset.from_dict({"prompt": [f"{i} 1 2 {i}" for i in range(8)]})


def sevens(completions, **_):
    return [float(text.split().count("7")) for text in completions]


def new_trainer(tmp_path, of=R2VPOTrainer, model=None, exact=True, extra=None, **options):
    """A trainer; `exact`: its log-probs come from float64 logits."""
    config = {R2VPOTrainer: R2VPOConfig, trl.GRPOTrainer: trl.GRPOConfig}[of]
    options = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [],
        "per_device_train_batch_size": 4, "num_generations": GROUP, "max_completion_length": T,
        "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "no", "eval_strategy": "no", "learning_rate": 1e-2,
    } | options  # fmt: skip
    with_reference = options.get("beta", 0.0) != 0.0
    if with_reference:
        # TRL reads the reference model from where the policy came from.
        path = tmp_path / "reference"
        if not path.exists():
            new_model().save_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    trainer = of(
        model=new_model() if model is None else model, reward_funcs=sevens, args=config(**options),
        train_dataset=dataset(), processing_class=new_tokenizer(), **(extra or {}),
    )  # fmt: skip
    if exact:
        trainer._get_per_token_logps_and_entropies = functools.partial(
            exact_logps, temperature=trainer.temperature
        )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def exact_logps(model, input_ids, attention_mask, logits_to_keep, *_, temperature=1.0, **__):
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    assert logits.dtype == torch.float64
    log_p = (logits[:, -logits_to_keep - 1 : -1] / temperature).log_softmax(-1)
    labels = input_ids[:, -logits_to_keep:, None]
    return log_p.gather(-1, labels)[..., 0], -(log_p.exp() * log_p).sum(-1), None


def new_inputs(sequences=8, seed=1, masks=True):
    """A batch as TRL makes one: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (sequences,), generator=generator)
    lengths[0] = T
    prompts = torch.randint(1, PROMPT + 1, (sequences,), generator=generator)
    completion_mask = (torch.arange(T) < lengths[:, None]).long()
    if masks:
        completion_mask[1] = 0
    prompt_mask = (torch.arange(PROMPT) >= PROMPT - prompts[:, None]).long()
    tokens = torch.randint(3, V, (sequences, PROMPT + T), generator=generator)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "prompt_ids": tokens[:, :PROMPT] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": tokens[:, PROMPT:] * completion_mask,
        "completion_mask": completion_mask,
        "advantages": noise(sequences),
        "num_items_in_batch": completion_mask.sum(),
        "group_ids": torch.randperm(sequences, generator=generator) // GROUP,
        "old_per_token_logps": -2.5 + 0.5 * noise(sequences, T),
        "ref_per_token_logps": -2.5 + 0.5 * noise(sequences, T),
    }


def near_policy(inputs):
    """The inputs with ratios about one, of sequences too, so that a clip takes some of them."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logps, _, _ = exact_logps(new_model(), tokens, attention, T, temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(3)
    gap = torch.linspace(-0.5, 0.5, len(tokens), dtype=torch.float64)[:, None]
    gap = gap + 0.1 * torch.randn(logps.shape, generator=generator, dtype=torch.float64)
    return inputs | {"old_per_token_logps": logps.detach() - gap}


def with_options(trainer, inputs, importance, tools):
    """The keys that only vLLM and tools bring, whose own machinery is not run here."""
    generator = torch.Generator().manual_seed(2)
    sequences = inputs["completion_mask"].shape[0]
    trainer.use_vllm = importance is not None
    if importance is not None:
        columns = {"token": T, "sequence": 1}[importance]
        ratio = torch.rand(sequences, columns, generator=generator, dtype=torch.float64)
        inputs = inputs | {"importance_sampling_ratio": ratio * 2}
    if tools:
        tool_mask = (torch.rand(sequences, T, generator=generator) > 0.3).long()
        tool_mask[2] = 0
        inputs = inputs | {"tool_mask": tool_mask}
    return inputs


def run(trainer, inputs, model=None):
    """(loss, every parameter's gradient)."""
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model if model is None else model, inputs)
    loss.backward()
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(got, expected, tolerance=F64):
    loss, gradients = got
    expected_loss, expected_gradients = expected
    largest = max(g.abs().max() for g in expected_gradients.values())
    assert largest > 1e-3
    assert abs(loss - expected_loss) <= tolerance * max(1.0, abs(expected_loss))
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == expected_gradients[name].dtype
        error = (gradient - expected_gradients[name]).abs().max()
        assert error <= tolerance * largest, name


def by_formula(trainer, inputs, weight, coef, level="token", by_group=False):
    """(loss, gradients) of Σ w·(-A·ρ + λ·(ρ - c)²), written out."""
    trainer.model.zero_grad()
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logps, _, _ = exact_logps(model, tokens, attention, T, temperature=trainer.temperature)
    mask = inputs["completion_mask"]
    delta = logps - inputs["old_per_token_logps"]
    if level == "sequence":
        mean = (delta * mask).sum(1) / mask.sum(1).clamp(min=1)
        delta = mean[:, None].expand(-1, T)
    ratio = delta.exp()
    center = torch.ones_like(ratio)
    if by_group:
        for group in inputs["group_ids"].unique():
            rows = inputs["group_ids"] == group
            center[rows] = (weight * ratio)[rows].sum() / weight[rows].sum()
    loss = (-inputs["advantages"][:, None] * ratio + coef * (ratio - center) ** 2) * weight
    loss.sum().backward()
    ratio = ratio.detach()[mask == 1]
    return (loss.sum().detach(), {n: p.grad.clone() for n, p in model.named_parameters()}), ratio


def weights(inputs, loss_type):
    mask = inputs["completion_mask"].double()
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return {
        "bnpo": mask / mask.sum(),
        "dr_grpo": mask / (len(mask) * T),
        "dapo": mask / inputs["num_items_in_batch"],
        "luspo": mask / len(mask),
    }[loss_type]


EXTRAS = {
    "plain": {},
    "everything": {"beta": 0.3, "entropy_coef": 0.2, "importance": "token", "tools": True},
    "per sequence": {"beta": 0.3, "importance": "sequence", "use_bias_correction_kl": False},
}


def assert_equals_grpo(tmp_path, inputs, extras, of_ours, of_theirs, **shared):
    """Loss, gradients, the metrics kl and entropy, in training and evaluation."""
    options = EXTRAS[extras] | shared
    importance, tools = options.pop("importance", None), options.pop("tools", False)
    beta = options.pop("beta", 0.0)
    options |= {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    options["temperature"] = TEMPERATURE
    ours = new_trainer(tmp_path, **options | of_ours)
    theirs = new_trainer(tmp_path, trl.GRPOTrainer, **options | of_theirs)
    for trainer in (ours, theirs):
        # The reference model itself is not needed.
        trainer.beta = beta
        given = with_options(trainer, inputs, importance, tools)
    assert_same(run(ours, given), run(theirs, given))
    for trainer in (ours, theirs):
        trainer.model.eval()
    assert_same(run(ours, given), run(theirs, given))
    for mode in ("train", "eval"):
        for name in ("entropy", "kl") if beta else ("entropy",):
            got, expected = (t._metrics[mode][name] for t in (ours, theirs))
            assert got == pytest.approx(expected, rel=F32)
    return ours, theirs


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", integration.LOSS_TYPES)
def test_equals_grpo_without_penalty_and_clip(tmp_path, loss_type, level, extras):
    assert_equals_grpo(
        tmp_path, new_inputs(), extras, {"variance_coef": 0.0}, {"epsilon": 1e9},
        loss_type=loss_type, importance_sampling_level=level,
    )  # fmt: skip


@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", integration.LOSS_TYPES)
def test_clip_equals_grpo(tmp_path, loss_type, level, delta):
    ours, theirs = assert_equals_grpo(
        tmp_path, near_policy(new_inputs(16)), "everything", {"policy_loss": "clip"},
        {}, epsilon=0.1, epsilon_high=0.2, delta=delta, loss_type=loss_type,
        importance_sampling_level=level,
    )  # fmt: skip
    names = [f"clip_ratio/{name}_mean" for name in ("low", "high", "region")]
    got, expected = ([t._metrics["train"][n][0] for n in names] for t in (ours, theirs))
    assert all(0 < share < 1 for share in got)
    # TRL's are shares of sequences at that level, and leave out what delta clips.
    if level == "token" and delta is None:
        assert got == pytest.approx(expected, rel=F32)
    if level == "token" and delta is not None:
        assert got[0] == pytest.approx(expected[0], rel=F32) and got[1] > expected[1] + 0.01


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo_equals_that_of_trl(tmp_path, level):
    ours, _ = assert_equals_grpo(
        tmp_path, near_policy(new_inputs(16)), "everything", {"policy_loss": "cispo"},
        {"loss_type": "cispo"}, epsilon_high=1.2, importance_sampling_level=level,
    )  # fmt: skip
    logged = ours._metrics["train"]
    assert logged["clip_ratio/low_mean"] == [0.0]
    assert 0 < logged["clip_ratio/high_mean"][0] < 1


@pytest.mark.parametrize("center", ["one", "group"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", integration.LOSS_TYPES)
def test_penalty_equals_formula(tmp_path, loss_type, level, center):
    trainer = new_trainer(
        tmp_path, loss_type=loss_type, importance_sampling_level=level, center=center,
        variance_coef=1.5, per_device_train_batch_size=8,
    )  # fmt: skip
    inputs = new_inputs()
    expected, ratio = by_formula(
        trainer, inputs, weights(inputs, loss_type), 1.5, level, center == "group"
    )
    assert_same(run(trainer, inputs), expected)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert logged["r2vpo/variance_coef"] == 1.5
    assert logged["r2vpo/ratio/mean"] == pytest.approx(ratio.mean().item(), rel=F32)
    assert logged["r2vpo/ratio/max"] == pytest.approx(ratio.max().item(), rel=F32)
    variance = ratio.var(correction=0).item()
    assert logged["r2vpo/ratio/var"] == pytest.approx(variance, rel=F32)
    parts = logged["r2vpo/loss/policy"] + logged["r2vpo/loss/penalty"]
    assert parts == pytest.approx(expected[0].item(), rel=F32)


@pytest.mark.parametrize("use_linear_loss", [False, True])
def test_log_ratios_are_clamped(tmp_path, use_linear_loss):
    trainer = new_trainer(tmp_path, log_ratio_clamp=0.05, use_linear_loss=use_linear_loss)
    run(trainer, new_inputs())
    logged = trainer._metrics["train"]
    assert logged["r2vpo/ratio/max"] == pytest.approx([math.exp(0.05)], rel=F32)
    assert logged["r2vpo/ratio/clamped"][0] > 0.5


@pytest.mark.parametrize("use_linear_loss", [False, True])
def test_on_policy_without_old_logps(tmp_path, use_linear_loss):
    """ρ = 1 with its gradient, as TRL has it."""
    ours = new_trainer(tmp_path, use_linear_loss=use_linear_loss)
    theirs = new_trainer(tmp_path, trl.GRPOTrainer)
    inputs = {k: v for k, v in new_inputs().items() if k != "old_per_token_logps"}
    assert_same(run(ours, inputs), run(theirs, inputs))
    assert ours._metrics["train"]["r2vpo/ratio/var"] == [0.0]


@pytest.mark.parametrize("use_linear_loss", [False, True])
def test_anchor(tmp_path, use_linear_loss):
    """With "rollout" the ratio is to the log-probs of vLLM, which TRL hands on."""
    options = {"use_linear_loss": use_linear_loss}
    inputs = new_inputs()
    generator = torch.Generator().manual_seed(7)
    recorded = torch.randn(8, T, generator=generator, dtype=torch.float64) - 3
    handed = inputs | {"sampling_per_token_logps": recorded}
    with pytest.raises(ValueError, match="anchor: got 'rollout', expected 'old': without use_vllm"):
        new_trainer(tmp_path, anchor="rollout", **options)
    extra = {"rollout_func": lambda prompts, trainer: {}}
    rollout = new_trainer(tmp_path, anchor="rollout", extra=extra, **options)
    old = new_trainer(tmp_path, **options)
    expected = run(old, inputs | {"old_per_token_logps": recorded})
    assert_same(run(rollout, handed), expected)
    assert (expected[0] - run(old, handed)[0]).abs() > 0.01
    with pytest.raises(ValueError, match="expected sampling_per_token_logps among them for anchor"):
        run(rollout, inputs)


def test_training_in_which_the_penalty_has_no_effect(tmp_path):
    """TRL's defaults: a batch of completions serves one optimizer step."""
    with pytest.warns(UserWarning, match=r"every importance ratio was exactly 1.*num_iterations"):
        new_trainer(tmp_path, exact=False, max_steps=4).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*every importance ratio")
        new_trainer(tmp_path, exact=False, max_steps=4, variance_coef=0.0).train()
        new_trainer(tmp_path, exact=False, max_steps=4, num_iterations=2).train()


def sum_of(results):
    losses, gradients = zip(*results, strict=True)
    return sum(losses), {n: sum(g[n] for g in gradients) for n in gradients[0]}


# "bnpo" is by its definition the mean of the micro-batches' own means.
@pytest.mark.parametrize("use_linear_loss", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo"])
def test_micro_batches_sum_to_the_batch(tmp_path, loss_type, use_linear_loss):
    options = {"loss_type": loss_type, "use_linear_loss": use_linear_loss}
    whole = new_trainer(tmp_path, per_device_train_batch_size=8, **options)
    parted = new_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    inputs = new_inputs()
    expected = run(whole, inputs)
    results = [run(parted, part) for part in split(inputs, 4)]
    assert_same(sum_of(results), expected)
    # What the log says of a step is the mean over its micro-batches.
    for name in ("policy", "penalty"):
        of_parts = parted._metrics["train"][f"r2vpo/loss/{name}"]
        of_whole = whole._metrics["train"][f"r2vpo/loss/{name}"]
        assert sum(of_parts) / 4 == pytest.approx(of_whole[0], rel=F32, abs=F32)


# Models that scale their logits, that cap them, and one whose head is its embedding.
MODELS = {
    "gpt2": GPT2,
    "tied": GPT2Config(**GPT2.to_diff_dict() | {"tie_word_embeddings": True}),
    "gemma2": Gemma2Config(**LLAMA, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere": CohereConfig(**LLAMA, logit_scale=0.25),
    "granite": GraniteConfig(**LLAMA, logits_scaling=4.0),
}


@pytest.mark.parametrize("options", [{}, {"center": "group"}, {"entropy_coef": 0.2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_linear_loss_equals_that_of_whole_logits(tmp_path, name, options):
    """The other side takes the logits of the model's own forward."""
    options = {"temperature": 0.7, "per_device_train_batch_size": 8} | options
    linear, plain = (
        new_trainer(tmp_path, model=new_model(MODELS[name]), use_linear_loss=use, **options)
        for use in (True, False)
    )
    # Log-probs too by the linear route.
    del linear._get_per_token_logps_and_entropies
    inputs = new_inputs()
    got, expected = run(linear, inputs), run(plain, inputs)
    assert abs(got[0] - expected[0]) <= F64 * max(1.0, abs(expected[0]))
    # The norms of the other models are computed in float32.
    assert_same(got, expected, F64 if name in ("gpt2", "tied") else F32)


@pytest.mark.parametrize("policy_loss", ["ratio", "clip"])
def test_linear_loss_in_float32(tmp_path, policy_loss):
    """The kernels that users get, beside TRL's."""
    linear, plain = (
        new_trainer(
            tmp_path, model=new_model().float(), exact=False, use_linear_loss=use,
            policy_loss=policy_loss,
        )
        for use in (True, False)
    )  # fmt: skip
    for trainer in (linear, plain):
        trainer.beta = 0.3
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in new_inputs().items()}
    assert_same(run(linear, inputs), run(plain, inputs), F32)


def test_only_completions_meet_the_head(tmp_path, monkeypatch):
    seen = []
    entry = integration.linear.linear_r2vpo_loss

    def spy(hidden, head, labels, *others, **keywords):
        seen.append((hidden.shape[1], labels, keywords["temperature"]))
        return entry(hidden, head, labels, *others, **keywords)

    monkeypatch.setattr(integration.linear, "linear_r2vpo_loss", spy)
    trainer = new_trainer(tmp_path, use_linear_loss=True, temperature=0.7)
    inputs = new_inputs()
    run(trainer, inputs)
    ((length, labels, temperature),) = seen
    assert (length, temperature) == (T, 0.7)
    assert ((labels == inputs["completion_ids"]) | (inputs["completion_mask"] == 0)).all()


@pytest.mark.parametrize("use_linear_loss", [False, True])
def test_nothing_valid_is_a_zero_with_a_gradient(tmp_path, use_linear_loss):
    trainer = new_trainer(tmp_path, use_linear_loss=use_linear_loss)
    inputs = new_inputs()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradients = run(trainer, inputs)
    assert loss == 0 and all((g == 0).all() for g in gradients.values())
    assert "lm_head.weight" in gradients


def test_adapters_beside_the_head(tmp_path):
    """PEFT: the linear option trains an adapter of the backbone as the other does."""
    results = []
    for use in (True, False):
        model = get_peft_model(
            new_model(),
            LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
        ).double()
        trainer = new_trainer(tmp_path, model=model, use_linear_loss=use)
        results.append(run(trainer, new_inputs()))
    assert_same(*results)
    assert all("lora" in name for name in results[0][1])


# From generation to loss.


def generated(trainer):
    """The micro-batches of one generation, by TRL's own path through shuffling and splitting."""
    torch.manual_seed(0)
    trainer._step, trainer._buffered_inputs = 0, None
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._prepare_inputs(batch)
    return trainer._buffered_inputs


def test_group_ids_follow_their_completions(tmp_path):
    trainer = new_trainer(
        tmp_path, center="group", gradient_accumulation_steps=4, per_device_train_batch_size=4
    )
    parts = generated(trainer)
    assert len(parts) == 4
    ids = torch.cat([part["group_ids"] for part in parts])
    assert ids.bincount().tolist() == [GROUP] * 4
    assert (ids.diff() < 0).any(), "nothing was shuffled"
    # The data set's prompts are all different: a group is a prompt.
    prompts = torch.cat([part["prompt_ids"] for part in parts])
    for i, group in enumerate(ids):
        assert ((prompts == prompts[i]).all(1) == (ids == group)).all()
    for part in parts:
        run(trainer, part)


def test_group_ids_in_evaluation(tmp_path):
    trainer = new_trainer(tmp_path, center="group", num_generations_eval=2)
    trainer.model.eval()
    rows = [{"prompt": "1 2"}] * 2 + [{"prompt": "3"}] * 2
    with torch.no_grad():
        output = trainer._prepare_inputs(rows)
        assert output["group_ids"].tolist() == [0, 0, 1, 1]
        assert trainer._compute_loss(trainer.model, output).isfinite()


def fenchel_formula(inputs, s_a, weight, target, by_group):
    weight, s_a = weight.flatten(), s_a.expand(weight.shape).flatten()
    if by_group:
        ids = inputs["group_ids"][:, None].expand(-1, T).flatten()
        for group in ids.unique():
            rows = ids == group
            s_a[rows] = s_a[rows] - (weight * s_a)[rows].sum() / weight[rows].sum()
    return ((weight * s_a**2).sum() / weight.sum()).sqrt() / (2 * target**0.5)


@pytest.mark.parametrize("importance", [None, "token", "sequence"])
@pytest.mark.parametrize("center", ["one", "group"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_fenchel_equals_formula(tmp_path, loss_type, center, importance):
    trainer = new_trainer(
        tmp_path, variance_coef_mode="fenchel", variance_target=0.04, center=center,
        loss_type=loss_type,
    )  # fmt: skip
    inputs = with_options(trainer, new_inputs(), importance, tools=False)
    s_a = inputs["advantages"][:, None] * inputs.get("importance_sampling_ratio", torch.ones(1, T))
    expected = fenchel_formula(
        inputs, s_a.clone(), weights(inputs, loss_type), 0.04, center == "group"
    )
    got = trainer._fenchel_coef(inputs, 2)
    assert got.item() == pytest.approx(expected.item(), rel=F32)


def test_fenchel_is_carried_to_every_micro_batch(tmp_path):
    trainer = new_trainer(
        tmp_path, variance_coef_mode="fenchel", variance_target=0.04,
        gradient_accumulation_steps=4, per_device_train_batch_size=4,
    )  # fmt: skip
    parts = generated(trainer)
    whole = {k: torch.cat([p[k] for p in parts]) for k in ("advantages", "completion_mask")}
    s_a = whole["advantages"][:, None].expand(whole["completion_mask"].shape)
    n = whole["completion_mask"].sum()
    expected = ((whole["completion_mask"] * s_a**2).sum() / n).sqrt() / (2 * 0.2)
    assert expected > 0
    for part in parts:
        assert part["variance_coef"].item() == pytest.approx(expected.item(), rel=F32)
        run(trainer, part)
    logged = trainer._metrics["train"]["r2vpo/variance_coef"]
    assert len(set(logged)) == 1 and logged[0] == pytest.approx(expected.item(), rel=F32)


# The dual.

DUAL = {"variance_coef_mode": "dual", "variance_target": 5.0, "variance_coef_lr": 0.5}


def stepped(coef, v):
    """Eq. 16, where v is not past twice the target."""
    assert v < 2 * DUAL["variance_target"]
    return coef * math.exp(DUAL["variance_coef_lr"] * (v / DUAL["variance_target"] - 1))


def moment(inputs, ratio, weight, by_group):
    """What the dual holds: the mean of (ρ - c)² over valid tokens, and their weight."""
    valid = inputs["completion_mask"] == 1
    weight, ids = weight[valid], inputs["group_ids"][:, None].expand(-1, T)[valid]
    center = torch.ones_like(ratio)
    for group in ids.unique() if by_group else []:
        rows = ids == group
        center[rows] = (weight * ratio)[rows].sum() / weight[rows].sum()
    total = weight.sum().item()
    return (weight * (ratio - center) ** 2).sum().item() / total, total


def optimizer_step():
    """What tells the trainer that the micro-batches so far were one step; weights stay."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()


def accumulate(trainer, parts):
    """λ after each micro-batch of one optimizer step, and after the step."""
    coefs = []
    for part in parts:
        run(trainer, part)
        coefs.append(trainer._constraint.coef.item())
    optimizer_step()
    return [*coefs, trainer._constraint.coef.item()]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("center", ["one", "group"])
def test_dual_moves_once_per_step_by_all_micro_batches(tmp_path, center, loss_type):
    trainer = new_trainer(
        tmp_path, center=center, loss_type=loss_type, gradient_accumulation_steps=4,
        per_device_train_batch_size=2, **DUAL,
    )  # fmt: skip
    inputs = new_inputs()
    *held, moved = accumulate(trainer, split(inputs, 4))
    assert held == [0.5] * 4
    weight = weights(inputs, loss_type)
    _, ratio = by_formula(trainer, inputs, weight, 0.0)
    v, _ = moment(inputs, ratio, weight, center == "group")
    assert moved == pytest.approx(stepped(0.5, v), rel=F32)
    # An evaluation moves nothing, whatever it says of gradients.
    trainer.model.eval()
    assert accumulate(trainer, [inputs]) == [moved] * 2


def test_dual_starts_and_ends_where_it_is_told(tmp_path):
    trainer = new_trainer(
        tmp_path, variance_coef_min=1.0, variance_coef_max=4.0, variance_coef=3.0, **DUAL
    )
    constraint = trainer._constraint
    assert (constraint.coef, constraint.min_coef, constraint.max_coef) == (3.0, 1.0, 4.0)


def test_dual_keeps_generations_apart(tmp_path):
    """Groups of two generations within one step bear the same ids, and are not the same."""
    trainer = new_trainer(
        tmp_path, center="group", gradient_accumulation_steps=2, steps_per_generation=1,
        per_device_train_batch_size=8, **DUAL,
    )  # fmt: skip
    first, second = new_inputs(seed=1), new_inputs(seed=2)
    # The same spread about another mean, so that one mean for both would show.
    second["old_per_token_logps"] = second["old_per_token_logps"] - 1.0
    parts = []
    for inputs in (first, second):
        weight = inputs["completion_mask"].double()
        _, ratio = by_formula(trainer, inputs, weight, 0.0)
        parts.append(moment(inputs, ratio, weight, by_group=True))
    v = sum(n * x for x, n in parts) / sum(n for _, n in parts)
    for trainer._generation, inputs in ((1, first), (2, second)):
        run(trainer, inputs)
    optimizer_step()
    assert trainer._constraint.coef.item() == pytest.approx(stepped(0.5, v), rel=F32)


# Training.


@pytest.mark.parametrize(("use_linear_loss", "beta"), [(False, 0.0), (True, 0.05)])
def test_training_with_dual_and_resuming(tmp_path, monkeypatch, use_linear_loss, beta):
    steps = []
    original = VarianceConstraint.step
    monkeypatch.setattr(
        VarianceConstraint, "step", lambda self, stats: (steps.append(1), original(self, stats))
    )
    options = DUAL | {
        "exact": False, "use_linear_loss": use_linear_loss, "beta": beta, "max_steps": 4,
        "gradient_checkpointing": use_linear_loss, "temperature": 0.7,
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    trainer = new_trainer(tmp_path, **options)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(steps) == 4
    assert all((p != before[n]).any() for n, p in trainer.model.named_parameters())
    logs = [row for row in trainer.state.log_history if "r2vpo/variance_coef" in row]
    coefs = [row["r2vpo/variance_coef"] for row in logs]
    assert len(set(coefs)) == 4
    for row in logs if beta == 0.0 else []:
        parts = row["r2vpo/loss/policy"] + row["r2vpo/loss/penalty"]
        assert row["loss"] == pytest.approx(parts, rel=F32, abs=F32)
    if beta:
        # At first the policy is the reference.
        assert logs[0]["kl"] < F32**2 < logs[1]["kl"]
    # The first step of a generation is on the policy that sampled it, the others are not.
    assert logs[0]["r2vpo/ratio/var"] < F32**2 < logs[1]["r2vpo/ratio/var"]
    # Of the optimizer step before.
    assert logs[1]["r2vpo/step/ratio_var"] < F32**2 < logs[2]["r2vpo/step/ratio_var"]
    assert not any(name.startswith(("clip_ratio", "r2vpo/tokens")) for name in logs[0])

    def resume():
        resumed = new_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        rows = [row for row in resumed.state.log_history if row["step"] == 3]
        return rows[-1]["r2vpo/variance_coef"]

    assert resume() == coefs[2]
    (tmp_path / "checkpoint-2" / integration.CONSTRAINT_FILE).unlink()
    with pytest.warns(UserWarning, match=r"variance_constraint.pt does not exist: .* at 0.5"):
        assert resume() == 0.5


def test_pooled_metrics_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logps, old, ref = (torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)).unbind()
    mask = torch.rand(6, 5, generator=generator) > 0.4
    mask[4:] = False

    def metrics(rows, share):
        out = r2vpo_loss_from_logps(
            logps[rows], old[rows], torch.ones(len(rows)), mask=mask[rows], ref_logps=ref[rows],
            normalizer=mask.sum() * share, entropy=-logps[rows],
        )  # fmt: skip
        values = out.metrics() | {"tokens": mask[rows].sum()}
        return {name: value.item() for name, value in values.items()}

    whole = metrics(torch.arange(6), 1.0)
    # The last part holds no token.
    parts = [metrics(rows, 1 / 3) for rows in torch.tensor([[0, 1], [2, 3], [4, 5]])]
    pooled = pool_metrics(parts)
    assert pooled == pytest.approx({k: v for k, v in whole.items() if k != "tokens"}, rel=1e-12)
    nothing = pool_metrics([parts[2], parts[2]])
    assert nothing["ratio/mean"] == nothing["ratio/ess"] == nothing["ratio/max"] == 1.0


# Two ranks.

RANKS = 2


def on_a_rank(rank, path):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        # Read, and not used: the ranks have met.
        "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
    }  # fmt: skip
    for options in ({"use_linear_loss": True}, {"center": "group"}):
        trainer = new_trainer(path, per_device_train_batch_size=8, max_steps=1, **DUAL, **options)
        # A step of training wraps the model, and leaves the ranks with the same weights.
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        assert (trainer.accelerator.gather(parameters[None]) == parameters).all()
        check_loss_on_ranks(rank, trainer)
        check_fenchel_on_ranks(rank, trainer)
        ids = torch.cat([part["group_ids"] for part in generated(trainer)])
        assert sorted(ids.tolist()) == [2 * rank] * GROUP + [2 * rank + 1] * GROUP
    check_fsdp_on_ranks(rank, path)


def check_loss_on_ranks(rank, trainer):
    inputs = new_inputs(16)
    coef, by_group = trainer._constraint.coef.item(), trainer.args.center == "group"
    weight = weights(inputs, "dapo")
    expected, ratio = by_formula(trainer, inputs, weight, coef, by_group=by_group)
    trainer._metrics["train"].clear()
    loss, gradients = run(trainer, split(inputs, RANKS)[rank], trainer.model_wrapped)
    optimizer_step()
    # DDP makes the ranks' mean of gradients.
    loss = trainer.accelerator.reduce(loss, reduction="mean")
    assert_same((loss, gradients), expected)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert logged["r2vpo/ratio/mean"] == pytest.approx(ratio.mean().item(), rel=F32)
    assert logged["r2vpo/ratio/min"] == pytest.approx(ratio.min().item(), rel=F32)
    parts = logged["r2vpo/loss/policy"] + logged["r2vpo/loss/penalty"]
    assert parts == pytest.approx(expected[0].item(), rel=F32)
    v, _ = moment(inputs, ratio, weight, by_group)
    assert trainer._constraint.coef.item() == pytest.approx(stepped(coef, v), rel=F32)


def check_fenchel_on_ranks(rank, trainer):
    """Where the ranks have padded to different lengths."""
    inputs = new_inputs(16)
    inputs["completion_mask"][:8, -1] = 0
    share = split(inputs, RANKS)[rank] | {"importance_sampling_ratio": torch.ones(8, T)}
    if rank == 0:
        share = {k: v[:, :-1] if v.dim() == 2 else v for k, v in share.items()}
    by_group = trainer.args.center == "group"
    s_a = inputs["advantages"][:, None].expand(-1, T).clone()
    mask = inputs["completion_mask"].double()
    expected = fenchel_formula(inputs, s_a, mask, DUAL["variance_target"], by_group)
    trainer.use_vllm = True
    got = trainer._fenchel_coef(share, 4)
    trainer.use_vllm = False
    assert got.item() == pytest.approx(expected.item(), rel=F32)


def check_fsdp_on_ranks(rank, path):
    """FSDP2, with a head that is sharded by itself."""
    trainer = new_trainer(path, use_linear_loss=True, per_device_train_batch_size=8)
    inputs = new_inputs(16)
    expected, _ = by_formula(trainer, inputs, weights(inputs, "dapo"), 0.5)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(trainer.model.lm_head, mesh=mesh)
    fully_shard(trainer.model, mesh=mesh)
    loss, gradients = run(trainer, split(inputs, RANKS)[rank])
    loss = trainer.accelerator.reduce(loss, reduction="mean")
    assert_same((loss, {n: g.full_tensor() for n, g in gradients.items()}), expected)


@pytest.mark.slow
def test_ranks_are_one_batch(tmp_path):
    """DDP and FSDP2 over gloo: gradients, means, the dual, Fenchel's λ, metrics, group ids."""
    run_on(RANKS, tmp_path, on_a_rank, tmp_path)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "cispo"}, "loss_type: got 'cispo', expected one of 'grpo', 'bnpo'"),
        ({"loss_type": "sapo"}, "loss_type: got 'sapo', expected"),
        ({"loss_type": "vespo"}, "loss_type: got 'vespo', expected"),
        ({"importance_sampling_level": "group"}, "importance_sampling_level: got 'group', exp"),
        ({"center": "two"}, "center: got 'two', expected one of 'one', 'group'"),
        ({"policy_loss": "ppo"}, "policy_loss: got 'ppo', expected one of 'ratio', 'clip', 'cisp"),
        ({"epsilon": 0.3}, "epsilon: got 0.3, expected 0.2: policy_loss 'ratio' does not read it"),
        ({"epsilon_high": 0.28}, "epsilon_high: got 0.28, expected None: policy_loss 'ratio'"),
        ({"delta": 2.0}, "delta: got 2.0, expected None: policy_loss 'ratio' does not read it"),
        ({"policy_loss": "clip", "epsilon": 1.5}, "epsilon: got 1.5, expected a finite number"),
        ({"policy_loss": "clip", "epsilon_high": -1.0}, "epsilon_high: got -1.0, expected a fini"),
        (
            {"policy_loss": "clip", "epsilon_high": 0.28, "delta": 1.25},
            "delta: got 1.25, expected at least 1 + epsilon_high",
        ),
        ({"policy_loss": "cispo"}, "epsilon_high: got None, expected at least 1: with policy_loss"),
        (
            {"policy_loss": "cispo", "epsilon_high": 0.28},
            "epsilon_high: got 0.28, expected at least 1: with policy_loss",
        ),
        (
            {"policy_loss": "cispo", "epsilon_high": 5.0, "epsilon": 0.1},
            "epsilon: got 0.1, expected 0.2: policy_loss 'cispo' does not read it",
        ),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold: got 0.5, expected None"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile: got 0.2, expected 1.0"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy: got True, expected False"),
        ({"use_liger_kernel": True}, "use_liger_kernel: got True, expected False"),
        ({"variance_coef": -1.0}, "variance_coef: got -1.0, expected a finite number from 0"),
        ({"variance_coef_mode": "auto"}, "variance_coef_mode: got 'auto', expected one of 'fixed'"),
        ({"variance_coef_mode": "dual"}, "variance_target: got None, expected a number above 0"),
        (
            {"variance_coef_mode": "fenchel", "variance_target": 0.0},
            "variance_target: got 0.0, expected a number above 0",
        ),
        ({"variance_target": 0.1}, "variance_target: got 0.1, expected None: variance_coef_mode"),
        (
            {"variance_coef_mode": "fenchel", "variance_target": 0.1, "variance_coef": 1.0},
            "variance_coef: got 1.0, expected None: variance_coef_mode 'fenchel' does not read it",
        ),
        ({"variance_coef_lr": 1.0}, "variance_coef_lr: got 1.0, expected 0.1"),
        (DUAL | {"variance_coef_min": 0.0}, "variance_coef_min: got 0.0, expected a number above"),
        (DUAL | {"variance_coef_max": 1e-4}, "variance_coef_max: got 0.0001, expected a finite"),
        (DUAL | {"variance_coef": 0.0}, "variance_coef: got 0.0, expected a finite number from"),
        ({"anchor": "new"}, "anchor: got 'new', expected one of 'old', 'rollout'"),
        (
            {"anchor": "rollout", "use_vllm": True},
            "vllm_importance_sampling_correction: got True, expected False with anchor 'rollout'",
        ),
        ({"sapo_temperature_pos": 3.0}, "sapo_temperature_pos: got 3.0, expected 1.0"),
        ({"entropy_coef_max": 9.0}, "entropy_coef_max: got 9.0"),
        (
            {"use_linear_loss": True, "cast_lm_head_to_fp32": True},
            "cast_lm_head_to_fp32: got True, expected False",
        ),
    ],
    ids=str,
)
def test_options_that_have_no_place(options, message):
    with pytest.raises(ValueError) as error:
        R2VPOConfig(use_cpu=True, bf16=False, **options)
    assert str(error.value).startswith(message)


def test_default_of_the_coefficient():
    """A clip has no penalty, but where the dual is to move one."""
    dual = {"variance_coef_mode": "dual", "variance_target": 0.1}
    for options, expected in (({}, (0.5, 0.0)), (dual, (0.5, 0.5))):
        for policy_loss, coef in zip(("ratio", "clip"), expected, strict=True):
            config = R2VPOConfig(use_cpu=True, bf16=False, policy_loss=policy_loss, **options)
            assert config.variance_coef == coef


def test_options_on_the_command_line():
    parser = trl.TrlParser(R2VPOConfig)
    assert "variance_target" in parser.format_help()
    given = "--use_cpu --bf16 false --center group --variance_coef_mode dual --variance_target 0.1"
    (config,) = parser.parse_args_and_config(given.split())
    assert (config.center, config.variance_target, config.variance_coef) == ("group", 0.1, 0.5)


def test_a_configuration_of_grpo_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args: got GRPOConfig, expected an R2VPOConfig"):
        R2VPOTrainer(
            new_model(), sevens, trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=dataset(), processing_class=new_tokenizer(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"center": "group"}, "group_ids"),
        ({"num_iterations": 2}, "old_per_token_logps"),
        ({"steps_per_generation": 2}, "old_per_token_logps"),
        ({"variance_coef_mode": "fenchel", "variance_target": 0.1}, "variance_coef"),
        ({"beta": 0.1}, "ref_per_token_logps"),
        ({"loss_type": "dapo"}, "num_items_in_batch"),
        ({}, "importance_sampling_ratio"),
    ],
    ids=str,
)
@pytest.mark.parametrize("use_linear_loss", [False, True])
def test_batches_that_lack_what_is_needed(tmp_path, options, missing, use_linear_loss):
    trainer = new_trainer(tmp_path, use_linear_loss=use_linear_loss, **options)
    trainer.use_vllm = missing == "importance_sampling_ratio"
    inputs = new_inputs() | {"variance_coef": torch.tensor(1.0)}
    inputs.pop(missing, None)
    with pytest.raises(ValueError, match=f"inputs: got prompt_ids, .*expected {missing} among"):
        trainer._compute_loss(trainer.model, inputs)


def test_completions_used_within_one_step_need_no_old_logps(tmp_path):
    trainer = new_trainer(
        tmp_path, num_iterations=2, steps_per_generation=1, gradient_accumulation_steps=2
    )
    inputs = {k: v for k, v in new_inputs().items() if k != "old_per_token_logps"}
    assert trainer._compute_loss(trainer.model, inputs).isfinite()


@pytest.mark.parametrize("training", [True, False])
def test_groups_that_do_not_fit_the_batch(tmp_path, training):
    trainer = new_trainer(tmp_path, num_generations_eval=2)
    trainer.model.train(training)
    name = "num_generations: got 4" if training else "num_generations_eval: got 2"
    with pytest.raises(ValueError, match=f"{name}, expected a divisor of the 3 sequences"):
        trainer._generate_and_score_completions([{"prompt": "1 2"}] * 3)


def test_ids_of_groups_that_are_not_there(tmp_path):
    trainer = new_trainer(tmp_path, center="group")
    with pytest.raises(ValueError, match=r"group_ids: got \d at \d+, expected 0 <= id < 1"):
        trainer._compute_loss(trainer.model, new_inputs(4) | {"group_ids": torch.arange(4)})


def test_heads_that_the_linear_loss_refuses(tmp_path):
    wrapped = get_peft_model(
        new_model(),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"]),
    )
    with pytest.raises(ValueError, match=r"use_linear_loss: got True, expected False where .*peft"):
        new_trainer(tmp_path, model=wrapped, use_linear_loss=True)
    # A transform between hidden states and head.
    bert = BertConfig(**SIZES, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16, is_decoder=True)  # fmt: skip
    with pytest.raises(ValueError, match="BertLMHeadModel: its logits are not those"):
        new_trainer(tmp_path, model=new_model(bert), use_linear_loss=True)
    experts = MixtralConfig(**LLAMA, num_local_experts=2, output_router_logits=True)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.0: it leaves out the auxiliary"):
        new_trainer(tmp_path, model=new_model(experts), use_linear_loss=True)


def test_auxiliary_loss_of_experts(tmp_path):
    experts = MixtralConfig(**LLAMA, num_local_experts=2, output_router_logits=True)
    ours, theirs = (
        new_trainer(tmp_path, of, model=new_model(experts).float(), exact=False, **options)
        for of, options in ((R2VPOTrainer, {"variance_coef": 0.0}), (trl.GRPOTrainer, {}))
    )
    inputs = {k: v for k, v in new_inputs().items() if k != "old_per_token_logps"}
    assert_same(run(ours, inputs), run(theirs, inputs), F32)
    assert ours._metrics["train"]["aux_loss"] == theirs._metrics["train"]["aux_loss"] != [0.0]


def test_a_trl_that_lacks_something_is_named(monkeypatch, forget):
    forget("r2vpo_kernels.integrations.trl")
    monkeypatch.delattr(trl.GRPOTrainer, "_compute_loss")
    message = r"trl: got version .*, which has GRPOTrainer without _compute_loss; .* with 1\.16\.0"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("r2vpo_kernels.integrations.trl")
