"""SkyRL's trainers, which send their workers what the penalty needs, and move λ."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from ... import RatioStats
from ...checks import check_choice, invalid
from ..hook import ANCHORS, check_settings, optimizer_steps
from ..steps import OptimizerSteps
from . import SUMS, R2VPOAlgorithmConfig, skyrl

with skyrl.imports():
    import ray
    from skyrl.backends.skyrl_train.utils.io import io
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (
        off_policy_correction_enabled,
    )
    from skyrl.backends.skyrl_train.workers.worker_dispatch import WorkerDispatch
    from skyrl.train.config import make_config
    from skyrl.train.entrypoints.main_base import BasePPOExp
    from skyrl.train.fully_async_trainer import FullyAsyncRayPPOTrainer
    from skyrl.train.trainer import RayPPOTrainer
    from skyrl.train.utils import validate_cfg
    from skyrl.train.utils.utils import initialize_ray
skyrl.takes(WorkerDispatch.forward_backward_from_staged, "loss_fn_config")
skyrl.takes(RayPPOTrainer._normalize_advantages, "data")
skyrl.has(RayPPOTrainer, "_execute_training_step", "_skip_policy_forward", "build_models")

ADVICE = (
    "Set trainer.algorithm.anchor=rollout, or take several optimizer steps per batch "
    "(trainer.policy_mini_batch_size below trainer.train_batch_size, "
    "trainer.update_epochs_per_batch)."
)


# The mixin's base, of which mypy knows nothing.
_Trainer: Any = object


def validate(cfg: Any) -> None:
    """Raise for what cannot be right, once SkyRL's validate_cfg has passed."""
    algorithm = cfg.trainer.algorithm
    if not isinstance(algorithm, R2VPOAlgorithmConfig):
        expected = "R2VPOAlgorithmConfig: make_config(algorithm_cls=R2VPOAlgorithmConfig)"
        raise invalid("trainer.algorithm", type(algorithm).__name__, expected)
    check_choice("policy_loss_type", algorithm.policy_loss_type, ("r2vpo",))
    check_choice("anchor", algorithm.anchor, ANCHORS)
    if algorithm.anchor == "rollout":
        if off_policy_correction_enabled(algorithm.off_policy_correction):
            expected = "it unset: the ratio to anchor 'rollout' corrects already"
            raise invalid("off_policy_correction", algorithm.off_policy_correction, expected)
        if cfg.generator.sampling_params.logprobs is None:
            expected = "a number: anchor 'rollout' takes the engine's log-probs"
            raise invalid("generator.sampling_params.logprobs", None, expected)
    elif cfg.trainer.fully_async.enabled:
        expected = "'rollout' with trainer.fully_async: every ratio to 'old' is 1 there"
        raise invalid("anchor", repr(algorithm.anchor), expected)
    check_settings(algorithm)


class PolicyDispatch:
    """A `WorkerDispatch` that sends λ to the policy's workers, and follows their optimizer steps.

    While λ follows the dual, the configuration's variance_coef is its value: SkyRL's checkpoints
    hold the configuration.
    """

    def __init__(self, dispatch: Any, steps: OptimizerSteps, algorithm: Any) -> None:
        self._dispatch = dispatch
        self._steps = steps
        self._algorithm = algorithm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dispatch, name)

    def forward_backward_from_staged(self, model: str, *args: Any, **kwargs: Any) -> Any:
        if model == "policy" and self._steps.constraint is not None:
            kwargs["loss_fn_config"] = {"variance_coef": self._algorithm.variance_coef}
        output = self._dispatch.forward_backward_from_staged(model, *args, **kwargs)
        if model == "policy":
            sums = [output.metrics.pop(f"loss_metrics/{name}") for name in SUMS]
            self._steps.follow(RatioStats(*(torch.tensor([x], dtype=torch.float64) for x in sums)))
        return output

    def optim_step(self, model: str, *args: Any, **kwargs: Any) -> Any:
        grad_norm = self._dispatch.optim_step(model, *args, **kwargs)
        # Workers skip a step whose gradient is not finite.
        if model == "policy" and (grad_norm is None or math.isfinite(grad_norm)):
            self._steps.close()
            if self._steps.constraint is not None:
                self._algorithm.variance_coef = self._steps.constraint.coef.item()
        return grad_norm


class R2VPOSteps(_Trainer):
    """Before a trainer of SkyRL's among the bases of a class: what this loss adds to it."""

    dispatch: Any

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        validate(cfg)
        self.algorithm = cfg.trainer.algorithm
        self.steps = optimizer_steps(self.algorithm, advice=ADVICE)
        if self.steps.constraint is not None:
            self.algorithm.variance_coef = self.steps.constraint.coef.item()
        super().__init__(cfg, *args, **kwargs)

    def build_models(self, *args: Any, **kwargs: Any) -> None:
        super().build_models(*args, **kwargs)
        self.dispatch = PolicyDispatch(self.dispatch, self.steps, self.algorithm)

    def _skip_policy_forward(self, training_input: Any) -> bool:
        """Whether nothing reads the old log-probs."""
        with_rollout = training_input.get("rollout_logprobs") is not None
        in_reward: bool = self.algorithm.use_kl_in_reward
        return self.algorithm.anchor == "rollout" and with_rollout and not in_reward

    def _normalize_advantages(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """w·A + i·w: the advantages as SkyRL divides them, and with them what it divides by.

        Workers hand advantages to the loss as they came, and nothing else per token.
        """
        advantages: Tensor = data["advantages"]
        batch_normalize = self.algorithm.advantage_batch_normalize
        self.algorithm.advantage_batch_normalize = False
        data["advantages"] = torch.ones_like(advantages)
        weights = super()._normalize_advantages(data, *args, **kwargs)["advantages"]
        self.algorithm.advantage_batch_normalize = batch_normalize
        data["advantages"] = advantages
        data = super()._normalize_advantages(data, *args, **kwargs)
        data["advantages"] = torch.complex(data["advantages"], weights)
        return data

    def _execute_training_step(self, model: str, data: Any) -> Any:
        status = super()._execute_training_step(model, data)
        if model == "policy":
            status |= {name: x.item() for name, x in self.steps.metrics().items()}
        return status

    def load_checkpoints(self) -> Any:
        loaded = super().load_checkpoints()
        path, constraint = loaded[1], self.steps.constraint
        if path is not None and constraint is not None:
            with io.open_file(os.path.join(path, "trainer_state.pt"), "rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=False)
            algorithm = state["config"]["trainer"]["algorithm"]
            saved = algorithm.get("variance_coef")
            if algorithm.get("variance_target") is not None:
                constraint.load_state_dict({"coef": torch.tensor(saved)})
                self.algorithm.variance_coef = saved
        return loaded


class R2VPOTrainer(R2VPOSteps, RayPPOTrainer):
    """SkyRL's trainer for the policy loss "r2vpo"."""


class FullyAsyncR2VPOTrainer(R2VPOSteps, FullyAsyncRayPPOTrainer):
    """SkyRL's fully asynchronous trainer for the policy loss "r2vpo"."""


class R2VPOExp(BasePPOExp):
    """SkyRL's experiment with these trainers."""

    def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
        fully_async = self.cfg.trainer.fully_async.enabled
        trainer = FullyAsyncR2VPOTrainer if fully_async else R2VPOTrainer
        return trainer(*args, **kwargs)


def train(cfg: Any) -> None:
    R2VPOExp(cfg).run()


def run(arguments: list[str]) -> None:
    config = make_config(algorithm_cls=R2VPOAlgorithmConfig)
    cfg = config.from_cli_overrides(
        # An argument of SkyRL's own main(), which its configuration does not have.
        [x for x in arguments if not x.startswith("trainer.override_entrypoint=")]
    )
    validate_cfg(cfg)
    validate(cfg)
    initialize_ray(cfg)
    # As in SkyRL's main(), the training loop does not run on the head node.
    ray.get(ray.remote(num_cpus=1)(train).remote(cfg))
