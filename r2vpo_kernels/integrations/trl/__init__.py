"""R²VPO in TRL 1.16: a GRPOTrainer whose loss is this package's.

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

from .. import check_version

check_version("trl", "1.16", "1.17")

from .coefficient import CONSTRAINT_FILE  # noqa: E402
from .config import LOSS_TYPES, R2VPOConfig  # noqa: E402
from .metrics import pool_metrics  # noqa: E402
from .trainer import R2VPOTrainer  # noqa: E402

__all__ = ["CONSTRAINT_FILE", "LOSS_TYPES", "R2VPOConfig", "R2VPOTrainer", "pool_metrics"]
