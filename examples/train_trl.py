"""R²VPO in TRL on a CPU, in under a minute: a tiny random Qwen2 learns to repeat a digit.

    python examples/train_trl.py

The prompt is a digit, the reward the share of the eight sampled tokens that are this digit: at
random one in thirteen. Each batch of completions serves several optimizer steps, so the ratio ρ
leaves 1, and the dual moves λ to hold E[(ρ - 1)²] at its target. Nothing is downloaded: model and
tokenizer are made here.
"""

from __future__ import annotations

import argparse
import os
import tempfile

# Before TRL is imported, which else would look for the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from r2vpo_kernels.integrations.trl import R2VPOConfig, R2VPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(10))]
LENGTH = 8


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **tokens, max_position_embeddings=32))


def repeats(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    pairs = zip(prompts, completions, strict=True)
    return [completion.split().count(prompt) / LENGTH for prompt, completion in pairs]


class Report(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        if "reward" in logs:
            names = {"reward": "reward", "λ": "r2vpo/variance_coef", "var ρ": "r2vpo/ratio/var"}
            values = "  ".join(f"{short} {logs[name]:.4f}" for short, name in names.items())
            print(f"step {state.global_step:3}  {values}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # the tensors are too small for more
    with tempfile.TemporaryDirectory() as folder:
        # 80 completions, 8 for each of 10 prompts; 4 micro-batches in two optimizer steps, twice.
        args = R2VPOConfig(
            folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=20, gradient_accumulation_steps=2, steps_per_generation=4,
            num_iterations=2, num_generations=8, max_completion_length=LENGTH, max_steps=steps,
            learning_rate=3e-3, lr_scheduler_type="constant", save_strategy="no",
            logging_steps=min(20, steps), variance_coef_mode="dual", variance_target=0.01,
        )  # fmt: skip
        trainer = R2VPOTrainer(
            make_model(), repeats, args, processing_class=make_tokenizer(), callbacks=[Report()],
            train_dataset=Dataset.from_dict({"prompt": [str(digit) for digit in range(10)]}),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
