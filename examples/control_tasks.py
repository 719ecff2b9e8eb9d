"""The tasks of continuous_control.py: environments of dm_control, as envpool compiles them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import (
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    TransformAction,
    TransformObservation,
    TransformReward,
)

try:
    import envpool
except ImportError as error:
    raise SystemExit(
        "continuous_control.py needs envpool, which has wheels for Linux alone: "
        "pip install 'r2vpo_kernels[control]' there"
    ) from error

EPISODE = 1000  # steps; dm_control's returns lie between 0 and that


@dataclass(frozen=True)
class Task:
    pool: str  # envpool's name
    kind: str  # dense or sparse reward, or changing dynamics
    # What multiplies each actuator's control, in parts of equal length of a training run.
    gains: tuple[tuple[float, ...], ...] = ()


TASKS = {
    "cheetah-run": Task("CheetahRun-v1", "dense"),
    "walker-walk": Task("WalkerWalk-v1", "dense"),
    "cartpole-swingup_sparse": Task("CartpoleSwingupSparse-v1", "sparse"),
    "ball_in_cup-catch": Task("BallInCupCatch-v1", "sparse"),
    "finger-turn_hard": Task("FingerTurnHard-v1", "sparse"),
    "reacher-hard": Task("ReacherHard-v1", "sparse"),
    # Three actuators of the back leg, three of the front. Dm_control's motors are linear in the
    # control: a factor on it is a factor on their gear.
    "cheetah-run-changing": Task(
        "CheetahRun-v1",
        "changing",
        (
            (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
            (0.5, 0.5, 0.5, 1.0, 1.0, 1.0),
            (1.0, 1.0, 1.0, 0.5, 0.5, 0.5),
            (0.6, 0.6, 0.6, 0.6, 0.6, 0.6),
        ),
    ),
}


class Pool(VectorEnv):
    """Envpool's environments with flat observations, and with gains on their actuators.

    An episode's last step returns its last observation, and the step after it ignores the action,
    resets the environment and has no reward: what gymnasium calls `AutoresetMode.NEXT_STEP`.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012, as gymnasium has it

    def __init__(self, name: str, num_envs: int, seed: int) -> None:
        self.pool = envpool.make(
            name, env_type="gymnasium", num_envs=num_envs, num_threads=1, seed=seed
        )
        self.num_envs = num_envs
        size = sum(int(np.prod(x.shape)) for x in self.pool.observation_space.values())
        self.single_observation_space = Box(-np.inf, np.inf, (size,), np.float64)
        self.single_action_space = self.pool.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.gains = np.ones(self.single_action_space.shape)
        self._ended = np.zeros(num_envs, dtype=bool)

    def _flat(self, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([x.reshape(self.num_envs, -1) for x in observations.values()], axis=1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Envpool takes its seed when it is made."""
        observations, _ = self.pool.reset()
        self._ended[:] = False
        return self._flat(observations), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        observations, rewards, terminated, truncated, _ = self.pool.step(actions * self.gains)
        # Envpool repeats the last reward with a reset.
        rewards = np.where(self._ended, 0.0, rewards)
        self._ended = terminated | truncated
        return self._flat(observations), rewards, terminated, truncated, {}


def make_environments(task: str, num_envs: int, seed: int, gamma: float) -> VectorEnv:
    """Normalised as PPO's well-known implementations do; `.unwrapped` is the Pool."""
    clip_to_10 = partial(np.clip, a_min=-10, a_max=10)
    environments: VectorEnv = Pool(TASKS[task].pool, num_envs, seed)
    environments = RecordEpisodeStatistics(environments)
    environments = TransformAction(environments, partial(np.clip, a_min=-1, a_max=1))
    environments = NormalizeObservation(environments)
    environments = TransformObservation(environments, clip_to_10)
    environments = NormalizeReward(environments, gamma=gamma)
    return TransformReward(environments, clip_to_10)
