"""Act with a trained agent in a Gymnasium vector environment.

python scripts/examples/act_in_vector_env.py runs/hopper Hopper-v5 3600
"""

import sys

import gymnasium
import numpy as np

from flowrl import load_agent


def act(run: str, env_id: str, target_return: float, episodes: int = 8, seed: int = 0) -> np.ndarray:
    """Act in ``episodes`` environments side by side; the return of the first episode of each."""
    agent = load_agent(run)
    envs = gymnasium.make_vec(env_id, num_envs=episodes)
    agent.reset(episodes, target_return, autoreset_mode=envs.metadata["autoreset_mode"])
    observations, _ = envs.reset(seed=seed)
    rewards = terminations = truncations = None
    returns, over = np.zeros(episodes), np.zeros(episodes, dtype=bool)
    while not over.all():
        actions = agent.act(observations, rewards, terminations, truncations)
        observations, rewards, terminations, truncations, _ = envs.step(actions)
        returns += np.where(over, 0, rewards)
        over |= terminations | truncations
    envs.close()
    return returns


if __name__ == "__main__":
    earned = act(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(f"mean return {earned.mean():.1f} of {len(earned)} episodes")
