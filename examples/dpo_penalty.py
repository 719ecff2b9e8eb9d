"""DPO with the ratio-variance penalty as its brake, on the digits of train_tiny.py.

    python examples/dpo_penalty.py                  # with λ = 0 and λ = 1
    python examples/dpo_penalty.py --coefs 0 0.1 10

DPO asks for a margin between two completions and lets go of how likely either is: the policy may
leave the reference for anywhere. The penalty of `r2vpo_loss_from_logps`, alone with zero
advantages, charges E[(ρ - 1)²] of the ratio of policy to reference, token by token:

    L = -log σ(β·(Δ_chosen - Δ_rejected)) + λ·E[(ρ - 1)²],    Δ = Σ_t log ρ_t

Pairs are two completions by the same model, of which the one with more right digits is chosen.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_tiny import (
    HELD_OUT,
    IGNORE,
    TinyTransformer,
    complete,
    completion_labels,
    greedy_success,
    make_prompts,
    right_digits,
    warm_up,
)

from r2vpo_kernels import r2vpo_loss_from_logps, token_logps


def make_pairs(model: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    """(2, pairs, T): chosen and rejected completions of the same prompts, ties left out."""
    prompts = make_prompts(count, generator)
    both = torch.stack([complete(model, prompts, generator) for _ in range(2)])
    scores = torch.stack([right_digits(tokens).sum(1) for tokens in both])
    both = torch.where((scores[0] >= scores[1])[None, :, None], both, both.flip(0))
    return both[:, scores[0] != scores[1]]


def dpo(
    model: nn.Module, reference: nn.Module, pairs: Tensor, beta: float, coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = pairs.flatten(0, 1)
    labels = completion_labels(tokens)
    logps = token_logps(model(tokens), labels)
    with torch.no_grad():
        ref_logps = token_logps(reference(tokens), labels)
    chosen, rejected = (logps - ref_logps).sum(1).chunk(2)
    penalty = r2vpo_loss_from_logps(
        logps, ref_logps, torch.zeros(len(tokens)), mask=labels != IGNORE, variance_coef=coef
    )
    margin = beta * (chosen - rejected)
    measured = {
        "accuracy": (margin > 0).float().mean(),
        "chosen": chosen.mean().detach(),
        "moment": penalty.stats.second_moment[0],
    }
    return -F.logsigmoid(margin).mean() + penalty.loss, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--coefs", type=float, nargs="+", default=[0.0, 1.0], help="λ, one run each"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=2048, help="prompts to make pairs from")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--warm-up", type=float, default=0.3, help="greedy success to start from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    reference = TinyTransformer()
    warm_up(reference, args.warm_up, generator)
    pairs, fresh = (make_pairs(reference, args.pairs, generator) for _ in range(2))
    prompts = make_prompts(HELD_OUT, generator)
    print(f"the reference answers {greedy_success(reference, prompts):.3f} of the prompts exactly")
    print("     λ   success   on fresh pairs: accuracy   log-ratio of the chosen   E[(ρ - 1)²]")
    for coef in args.coefs:
        model = copy.deepcopy(reference)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        generator.manual_seed(args.seed)
        for _ in range(args.steps):
            part = torch.randint(0, pairs.shape[1], (128,), generator=generator)
            loss, _ = dpo(model, reference, pairs[:, part], args.beta, coef)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            _, at = dpo(model, reference, fresh, args.beta, coef)
        print(
            f"{coef:6.2f} {greedy_success(model, prompts):9.3f} {at['accuracy']:26.3f} "
            f"{at['chosen']:25.2f} {at['moment']:13.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
