"""Train a tiny transformer to sort digits with the R²VPO loss, on a CPU, in a minute or two.

    python examples/train_tiny.py                   # R²VPO, its λ set by the dual
    python examples/train_tiny.py --loss ppo-clip   # the same training with PPO's clipped loss
    python examples/train_tiny.py --loss cispo      # or with CISPO's, clipped to the same range
    python examples/train_tiny.py --seeds 0 1 2     # several seeds, one after another
    python examples/train_tiny.py --top-p 0.9 --sampling-mask

The task: six digits and "=", then the same digits in order, as in `314159=113459`. A short
supervised warm-up leaves a model that greedily answers about one prompt in three. Then each batch
of rollouts samples a group of 8 completions for each of 96 prompts, rewards each with its share of
right digits, takes advantages relative to the group, and makes 8 optimizer steps on those samples.
So the policy leaves the one that sampled, the ratio ρ leaves 1, and the dual moves λ to bring
v = E[(ρ - 1)²] to its target. Success is exact answers by greedy decoding on 512 held-out prompts,
drawn from a seed of their own; of the million prompts there are, training sees some 2 %.

With --top-p rollouts are sampled from the most probable words alone, and the log-probs recorded are
those of the policy renormalised over these words, as an inference engine records them. With
--sampling-mask the loss renormalises too; without it the loss is over the full vocabulary, and the
ratio is not 1 even before the weights change. A token for which one word was kept has ρ = 1
whatever the policy does: --target-of choices holds v over the other tokens alone.

Writes a CSV for each seed and one plot into --out; its curves are of the rollouts, sampled.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from r2vpo_kernels import SamplingMask, VarianceConstraint, r2vpo_loss, token_logps

DIGITS = 6
LENGTH = 2 * DIGITS + 1
EQUALS, VOCABULARY = 10, 11
IGNORE = -100
GROUP, PROMPTS, HELD_OUT = 8, 96, 512
EPOCHS, MINIBATCHES = 2, 4
CLIP = 0.2
# What to compare with: the name of --loss, and what it asks of `r2vpo_loss`.
CLIPPED: dict[str, dict[str, Any]] = {
    "ppo-clip": {"policy_loss": "clip", "clip_range": CLIP},
    "cispo": {"policy_loss": "cispo", "clip_range": CLIP},
}

Row = dict[str, float]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, width), and keys and values of the tokens before; also returns all of those."""
        q, *kv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = torch.stack(kv) if past is None else torch.cat([past, torch.stack(kv)], dim=3)
        # What comes one by one may look at all that there is.
        attended = F.scaled_dot_product_attention(q, *seen, is_causal=past is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), seen


class TinyTransformer(nn.Module):
    """Tokens (B, T) to logits (B, T, V): causal, pre-norm, learned positions."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens, [None] * len(self.blocks))[0]

    def extend(
        self, tokens: Tensor, past: Sequence[Tensor | None]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits of tokens that follow those of `past`, and what to give as `past` next."""
        start = 0 if past[0] is None else past[0].shape[3]
        x = self.token(tokens) + self.position.weight[start : start + tokens.shape[1]]
        seen = []
        for block, before in zip(self.blocks, past, strict=True):
            x, all_of_it = block(x, before)
            seen.append(all_of_it)
        return self.head(x), seen


def make_prompts(count: int, generator: torch.Generator) -> Tensor:
    """(count, DIGITS + 1): random digits, then "="."""
    digits = torch.randint(0, 10, (count, DIGITS), generator=generator)
    return F.pad(digits, (0, 1), value=EQUALS)


def answers(tokens: Tensor) -> Tensor:
    return tokens[:, :DIGITS].sort(dim=1).values


def right_digits(tokens: Tensor) -> Tensor:
    """(B, DIGITS): where the completion agrees with the answer."""
    return tokens[:, DIGITS + 1 :] == answers(tokens)


def completion_labels(tokens: Tensor) -> Tensor:
    """The token after each position where that is one of the completion, else IGNORE."""
    labels = tokens.roll(-1, dims=1)
    labels[:, :DIGITS] = IGNORE
    # The last position keeps its logits: the backward of a slice would allocate them all again.
    labels[:, -1] = IGNORE
    return labels


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Where top-p keeps a word: all but the least probable that together have 1 - top_p or less."""
    p, words = probabilities.sort(-1)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, words, p.cumsum(-1) > 1 - top_p)


@torch.no_grad()
def sample(
    model: TinyTransformer, prompts: Tensor, generator: torch.Generator | None, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Prompts with their completions, sampled by top-p, or greedy without a generator.

    Also which words were kept for each label (B, LENGTH, V): none for those of the prompt.
    """
    tokens = chosen = prompts
    past: Sequence[Tensor | None] = [None] * len(model.blocks)
    kept = []
    while tokens.shape[1] < LENGTH:
        logits, past = model.extend(chosen, past)
        logits = logits[:, -1]
        probabilities = logits.softmax(-1)
        kept.append(nucleus(probabilities, top_p))
        if generator is None:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(probabilities * kept[-1], 1, generator=generator)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens, F.pad(torch.stack(kept, dim=1), (0, 0, DIGITS, 1))


def complete(model: TinyTransformer, prompts: Tensor, generator: torch.Generator | None) -> Tensor:
    """Prompts with their completions: sampled, or greedy without a generator."""
    return sample(model, prompts, generator)[0]


def kept_sets(kept: Tensor) -> SamplingMask:
    """Of what `sample` says was kept. The prompts' tokens have empty sets, and are masked."""
    return SamplingMask.from_counts(kept.nonzero()[:, -1], kept.sum(-1).flatten())


def greedy_success(model: TinyTransformer, prompts: Tensor) -> float:
    return right_digits(complete(model, prompts, None)).all(1).float().mean().item()


def warm_up(
    model: TinyTransformer,
    until: float,
    generator: torch.Generator,
    teach: Callable[[Tensor], Tensor] = answers,
) -> int:
    """Cross-entropy on what `teach` answers until greedy success on fresh prompts is `until`.

    Returns the steps. After a fixed number some seeds would be near 0 and others near 1.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(1, 1001):
        prompts = make_prompts(256, generator)
        tokens = torch.cat([prompts, teach(prompts)], dim=1)
        logits, labels = model(tokens), completion_labels(tokens)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE).backward()
        optimizer.step()
        if step % 5 == 0 and greedy_success(model, make_prompts(HELD_OUT, generator)) >= until:
            return step
    raise RuntimeError(f"the warm-up did not reach a success of {until} in {step} steps")


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards less their group's mean, over its standard deviation; 0 where all are the same."""
    groups = rewards.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    deviation = groups.std(1, keepdim=True, correction=0)
    return (centred / torch.where(deviation == 0, 1.0, deviation)).flatten()


def train(args: argparse.Namespace, seed: int) -> list[Row]:
    """One seed, warm-up included; one row for each batch of rollouts."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    held_out = make_prompts(HELD_OUT, torch.Generator().manual_seed(2**31))
    model = TinyTransformer()
    warm_up_steps = warm_up(model, args.warm_up, generator)
    before = greedy_success(model, held_out)

    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    constraint = VarianceConstraint(args.target, lr=args.dual_lr)
    # Each step of the dual changes the λ in place.
    objective = CLIPPED.get(args.loss, {"variance_coef": constraint.coef})
    rows: list[Row] = []
    for step in range(1, args.steps + 1):
        prompts = make_prompts(PROMPTS, generator).repeat_interleave(GROUP, dim=0)
        tokens, kept = sample(model, prompts, generator, args.top_p)
        labels, right = completion_labels(tokens), right_digits(tokens)
        rewards = right.float().mean(1)
        advantages = group_advantages(rewards)
        with torch.no_grad():
            sets = kept_sets(kept) if args.top_p < 1 else None
            old_logps = token_logps(model(tokens), labels, sampling_mask=sets)

        stats, metrics, norms = [], [], []
        for _ in range(EPOCHS):
            for part in torch.randperm(len(tokens), generator=generator).chunk(MINIBATCHES):
                batch = model(tokens[part]), labels[part], old_logps[part], advantages[part]
                sets = kept_sets(kept[part]) if args.sampling_mask else None
                out = r2vpo_loss(*batch, sampling_mask=sets, return_entropy=True, **objective)
                if args.loss == "r2vpo":
                    if args.target_of == "choices":
                        # Where one word was kept ρ is 1: such tokens are in the weight alone.
                        out.stats.weight.mul_(1 - out.metrics()["support/single"])
                    constraint.step(out.stats)
                optimizer.zero_grad()
                out.loss.backward()
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
                optimizer.step()
                stats.append(out.stats)
                metrics.append(out.metrics())

        row = {
            "step": step,
            "reward": rewards.mean().item(),
            "success": right.all(1).float().mean().item(),
            # Over all steps, the first with ρ = 1 too: what the dual steers.
            "ratio_var": sum(stats[1:], stats[0]).second_moment.item(),
            "target": args.target,
            "lambda": constraint.coef.item() if args.loss == "r2vpo" else math.nan,
            "kl_old": torch.stack([m["kl/old"] for m in metrics]).mean().item(),
            "entropy": torch.stack([m["entropy"] for m in metrics]).mean().item(),
            # Of the first step: at the weights that sampled.
            "fresh_mean": metrics[0]["ratio/mean"].item(),
            "fresh_var": metrics[0]["ratio/var"].item(),
            "single": (kept.sum(-1) == 1).sum().item() / right.numel(),
            "grad_norm": torch.stack(norms).mean().item(),
            "seconds": time.perf_counter() - start,
        }
        rows.append(row)
        text = f"success {row['success']:.2f} v {row['ratio_var']:.4f}"
        show_progress(f"{args.loss} seed {seed}", step, args.steps, text)

    after = greedy_success(model, held_out)
    if args.top_p < 1:
        mean, variance = (
            sum(row[x] for row in rows) / len(rows) for x in ("fresh_mean", "fresh_var")
        )
        print(f"ρ at the weights that sampled: mean {mean:.7f}, variance {variance:.1e}")
    print(
        f"{args.loss} seed {seed}: success (greedy, {HELD_OUT} held-out prompts) {before:.3f} "
        f"after {warm_up_steps} warm-up steps -> {after:.3f} after {args.steps} batches of RL, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return rows


def show_progress(name: str, step: int, steps: int, text: str) -> None:
    """A bar on a terminal; elsewhere, as in a log, ten lines in all."""
    text = f"{name}: {step}/{steps} {text}"
    if sys.stderr.isatty():
        bar = f"[{'#' * (20 * step // steps):.<20}]"
        sys.stderr.write(f"\r{bar} {text}" + "\n" * (step == steps))
    elif 10 * step // steps > 10 * (step - 1) // steps:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


def plot(runs: dict[int, list[Row]], loss: str, path: Path) -> None:
    """Reward and success, v against its target, and λ where there is one, over the batches."""
    ylabels = ["share, in sampled rollouts", "v = E[(ρ - 1)²] (no unit)", "λ (no unit)"]
    curves = [
        (0, "reward", "--", "right digits"),
        (0, "success", "-", "exact"),
        (1, "ratio_var", "-", "v"),
        (2, "lambda", "-", "λ"),
    ]
    held = "target"
    if loss != "r2vpo":
        ylabels, curves, held = ylabels[:2], curves[:3], "R²VPO's target, not held here"
    figure = Figure(figsize=(7, 2.6 * len(ylabels)), layout="constrained")
    axes = figure.subplots(len(ylabels), sharex=True)
    for index, (seed, rows) in enumerate(runs.items()):
        steps = [row["step"] for row in rows]
        for panel, column, style, label in curves:
            y = [row[column] for row in rows]
            axes[panel].plot(steps, y, style, color=f"C{index}", label=f"{label}, seed {seed}")
    axes[1].axhline(rows[0]["target"], color="black", linestyle=":", label=held)
    for axis, ylabel in zip(axes, ylabels, strict=True):
        axis.set_ylabel(ylabel)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set(title=f"train_tiny, {loss}", ylim=(0, 1))
    axes[1].set_yscale("log")
    axes[-1].set_xlabel(f"batches of rollouts ({EPOCHS * MINIBATCHES} optimizer steps each)")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--loss", choices=("r2vpo", *CLIPPED), default="r2vpo", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--seeds", type=int, nargs="+", help="several seeds, one after another, instead of --seed")
    add("--steps", type=int, default=100, help="batches of rollouts (default: %(default)s)")
    add("--warm-up", type=float, default=0.3, help="success to start from (default: %(default)s)")
    add("--lr", type=float, default=3e-4, help="Adam's, in RL (default: %(default)s)")
    add("--target", type=float, default=0.01, help="the v to hold (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="of sampling (default: %(default)s)")
    add("--sampling-mask", action="store_true", help="give the loss the words that top-p kept")
    add("--target-of", choices=("all", "choices"), default="all", help="the tokens whose v it is")
    add("--dual-lr", type=float, default=0.1, help="the step of log λ (default: %(default)s)")
    add("--out", type=Path, default=Path("demo"), help="folder to write (default: %(default)s)")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    args = parser.parse_args()
    if args.target_of == "choices" and not (args.sampling_mask and args.loss == "r2vpo"):
        parser.error("--target-of choices needs --sampling-mask and --loss r2vpo")

    # One by default: where other programs keep the cores busy, operations this small wait for a
    # second thread longer than they compute.
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for seed in args.seeds or [args.seed]:
        runs[seed] = train(args, seed)
        with open(args.out / f"train_tiny_{args.loss}_seed{seed}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(runs[seed][0]))
            writer.writeheader()
            writer.writerows(runs[seed])
    plot(runs, args.loss, args.out / f"train_tiny_{args.loss}.png")


if __name__ == "__main__":
    main()
