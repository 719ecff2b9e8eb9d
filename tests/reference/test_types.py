"""What an editor and a type checker see: every keyword of every entry."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HEADER = """
import torch
from r2vpo_kernels import (
    SamplingMask, linear_r2vpo_loss, linear_token_logps, r2vpo_loss, r2vpo_loss_from_logps,
    token_logps,
)
sets = SamplingMask.from_lists([[1], None])
x = torch.zeros(1)
head = torch.nn.Linear(1, 1)
"""
REVEALED = {
    "r2vpo_loss(x, x, None, x, center='group', kl_estimator='k3')": "R2VPOOutput",
    "linear_r2vpo_loss(x, head, x, x, x, softcap=3.0, reduction='none')": "R2VPOOutput",
    "r2vpo_loss_from_logps(x, x, x, entropy=x, center=x, backend='cpp')": "R2VPOOutput",
    "r2vpo_loss(x, x, x, x, policy_loss='clip', clip_range=(0.2, 0.3), dual_clip=3)": "R2VPOOutput",
    "r2vpo_loss_from_logps(x, x, x, ref_logps=x, kl_unbiased=True)": "R2VPOOutput",
    "token_logps(x, x)": "Tensor",
    "r2vpo_loss(x, x, None, x, sampling_mask=sets)": "R2VPOOutput",
    "linear_token_logps(x, x, x, sampling_mask=sets[1:])": "Tensor",
    "SamplingMask.from_padded(x, pad=0, missing_label='full')": "SamplingMask",
    "token_logps(x, x, return_entropy=True)": "tuple[Tensor, Tensor]",
    "linear_token_logps(x, x, x, return_entropy=False)": "Tensor",
    "linear_token_logps(x, x, x, return_entropy=True)": "tuple[Tensor, Tensor]",
    "linear_token_logps(x, head, x, logits_dtype=torch.float32)": "Tensor",
}
REJECTED = [
    "r2vpo_loss(x, x, None, x, variance_coeff=1.0)",
    "r2vpo_loss(x, x, None, x, center='two')",
    "linear_r2vpo_loss(x, head, x, x, x, policy_loss='ppo')",
    "r2vpo_loss(x, x, x, x, policy_loss='clip', clip_range='wide')",
    "r2vpo_loss(x, x, None, x, variance_coef='big')",
    "linear_r2vpo_loss(x, head, x, x, x, inplace=True)",
    "linear_r2vpo_loss(x, head, x, x, x, reduction='mean')",
    "linear_r2vpo_loss(x, head, x, x, x, logits_dtype='float32')",
    "r2vpo_loss_from_logps(x, x, x, temperature=0.5)",
    "token_logps(x, x, entropy=True)",
    "token_logps(x, x, sampling_mask=[[1]])",
    "r2vpo_loss_from_logps(x, x, x, sampling_mask=sets)",
    "SamplingMask(x, x, missing_label='drop')",
    "linear_token_logps(x, x, x, ratio_level='token')",
]


@pytest.mark.slow
def test_types_are_revealed_and_mistakes_rejected(tmp_path):
    lines = [f"reveal_type({call})" for call in REVEALED] + REJECTED
    file = tmp_path / "calls.py"
    file.write_text(HEADER + "\n".join(lines) + "\n")
    first = HEADER.count("\n") + 1
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", file]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    # An error may be followed by notes on the same line.
    said: dict[int, str] = {}
    for number, text in re.findall(r"calls\.py:(\d+): (.*)", run.stdout):
        said.setdefault(int(number), text)
    for line, (call, expected) in enumerate(REVEALED.items(), first):
        revealed = re.sub(r"(\w+\.)+", "", said[line])
        assert revealed == f'note: Revealed type is "{expected}"', call
    for line, call in enumerate(REJECTED, first + len(REVEALED)):
        assert "error: " in said.get(line, ""), call
