"""What the tests of the adapters share: a batch, its loss in plain torch, stand-ins for trainers.

Where a trainer's wheel is on the package index its own files take part, loaded as files where its
package needs a GPU stack to import. Of the others the contract stands in their tests: what their
hooks pass, and what an adapter calls of them, as in VERSIONS.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from unittest import mock

import torch

VERSIONS = {"slime": "0.3.1", "nemo-rl": "0.7.0", "prime-rl": "0.8.0", "skyrl": "0.3.0"}
NAN = float("nan")
# What `import r2vpo_kernels` must leave alone, by the adapters' names.
FRAMEWORKS = {
    "areal": "areal", "ms_swift": "swift", "nemo_rl": "nemo_rl", "openrlhf": "openrlhf",
    "prime_rl": "prime_rl", "skyrl": "skyrl", "slime": "slime", "torchtitan": "torchtitan",
    "trl": "trl", "verl": "verl",
}  # fmt: skip
ADAPTERS = (*FRAMEWORKS, "hook", "steps")


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


def wheel_file(package, ending, name):
    """A module loaded from a file of an installed distribution, without importing its package."""
    (path,) = (f for f in importlib.metadata.files(package) if str(f).endswith(ending))
    spec = importlib.util.spec_from_file_location(name, path.locate())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """On sys.meta_path: modules that a trainer imports and that its test does not reach."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path, target=None):
        if any(name == stub or name.startswith(stub + ".") for stub in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return mock.MagicMock(name=spec.name)

    def exec_module(self, module):
        module.__path__ = []
