"""What a behaviour policy is worth: its returns, measured in its own environment."""

from dataclasses import dataclass

import numpy as np

from flowrl.behavior.policy import BehaviorPolicy
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env


@dataclass(frozen=True)
class MeasuredReturns:
    """Undiscounted returns and lengths (steps) of whole episodes, in the order they were run."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))


def measure_returns(
    policy: BehaviorPolicy, episodes: int, seed: int, stochastic: bool = True
) -> MeasuredReturns:
    """Run ``episodes`` episodes of ``policy`` in ``policy.env_id`` and return what they earned.

    Episode i starts from environment seed ``seed + i`` and samples its actions from a generator of the same
    seed, so a measurement repeats exactly and does not depend on how many episodes came before.
    """
    environment = make_env(EnvironmentSpec(policy.env_id))
    returns, lengths = [], []
    for episode in range(episodes):
        generator = np.random.default_rng(seed + episode)
        observation, _ = environment.reset(seed=seed + episode)
        episode_return, length, finished = 0.0, 0, False
        while not finished:
            action = policy.act(observation[None], generator, stochastic)[0]
            observation, reward, terminated, truncated, _ = environment.step(action)
            episode_return += float(reward)
            length += 1
            finished = terminated or truncated
        returns.append(episode_return)
        lengths.append(length)
    environment.close()
    return MeasuredReturns(tuple(returns), tuple(lengths))
