"""R²VPO in TRL: a GRPOTrainer whose loss is this package's.

    from r2vpo_kernels.integrations.trl import R2VPOConfig, R2VPOTrainer

    args = R2VPOConfig(variance_coef_mode="dual", variance_target=0.02)
    R2VPOTrainer(model, reward_funcs, args, train_dataset=dataset).train()

Sampling, rewards, advantages, old and reference log-probs and the training loop stay TRL's. Four of
its private methods are overridden: `_generate_and_score_completions` (to add group ids, and λ in
closed form), `_compute_loss`, and the two that save λ to a checkpoint and restore it.

config.py holds the options, trainer.py the overrides, arguments.py what a micro-batch means to the
loss, coefficient.py how λ is set and saved, linear.py the route from hidden states, metrics.py what
is logged.
"""

from .. import Trainer

trl = Trainer("trl", tested="1.16.0")
with trl.imports():
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput
trl.has(
    GRPOTrainer, "_generate_and_score_completions", "_compute_loss", "_save_checkpoint",
    "_load_optimizer_and_scheduler", "_get_output_dir",
)  # fmt: skip
trl.takes(GRPOTrainer._get_per_token_logps_and_entropies, "compute_entropy", "compute_aux_loss")
trl.takes(GRPOTrainer.__init__, "quantization_config", "rollout_func", "environment_factory")
trl.has(
    GRPOConfig,
    "use_bias_correction_kl",
    "cast_lm_head_to_fp32",
    "vllm_importance_sampling_correction",
)
trl.takes(FusedCausalLMOutput, "log_probs", "entropy")

from .coefficient import CONSTRAINT_FILE  # noqa: E402
from .config import LOSS_TYPES, R2VPOConfig  # noqa: E402
from .metrics import pool_metrics  # noqa: E402
from .trainer import R2VPOTrainer  # noqa: E402

__all__ = ["CONSTRAINT_FILE", "LOSS_TYPES", "R2VPOConfig", "R2VPOTrainer", "pool_metrics"]
