"""Draw the package's agents in its environments, four timesteps of an episode each: docs/environments.png.

python scripts/maintain/picture_environments.py docs/environments.png
"""

import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowrl import load_agent
from flowrl.envs.vector import make_env
from flowrl.evaluation.video import make_rendered_env

ROBOTS = ("hopper", "halfcheetah", "walker2d")
NAMES = [f"{robot}-{task}" for robot in ROBOTS for task in ("medium-expert", "cued", "hidden")]
NAMES.remove("halfcheetah-hidden")  # the package has no agent for it
TIMESTEPS = (0, 60, 160, 290)
SEED = 1


def draw_robot(row: list[Axes], name: str) -> None:
    """Frames of one episode of the package's agent ``name``."""
    agent = load_agent(f"pretrained:{name}")
    assert agent.environment is not None
    env = make_rendered_env(agent.environment)
    observation, _ = env.reset(seed=SEED)
    agent.reset(None, agent.config.targets[0])
    reward, frames = None, {}
    for timestep in range(TIMESTEPS[-1] + 1):
        if timestep in TIMESTEPS:
            frames[timestep] = np.asarray(env.render())
        observation, earned, terminated, truncated, _ = env.step(agent.act(observation, reward))
        reward = float(earned)
        if terminated or truncated:
            break
    env.close()
    for axes, (timestep, frame) in zip(row, frames.items(), strict=False):
        axes.imshow(frame[::2, ::2])
        axes.set_title(f"timestep {timestep}", fontsize=7, pad=2)
    row[0].set_ylabel(f"{name}\n{agent.environment.env_id}", fontsize=7)


def draw_tmaze(axes: Axes) -> None:
    """Cue, flag and action of the package's agent over two episodes of opposite cues."""
    agent = load_agent("pretrained:tmaze-500")
    assert agent.environment is not None
    env = make_env(agent.environment)
    seen: dict[float, tuple[np.ndarray, np.ndarray]] = {}
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        agent.reset(None, 1.0)
        observations, actions, reward, over = [], [], None, False
        while not over:
            observations.append(observation)
            actions.append(agent.act(observation, reward))
            observation, earned, terminated, truncated, _ = env.step(actions[-1])
            reward = float(earned)
            over = terminated or truncated
        seen[float(observations[0][0])] = np.array(observations), np.array(actions)
        if len(seen) == 2:
            break
    for color, (cue, (observed, acted)) in zip(("tab:blue", "tab:orange"), sorted(seen.items()), strict=True):
        axes.plot(acted[:, 0], color=color, label=f"action, cue {cue:g}")
        axes.plot(0, observed[0, 0], "o", color=color)
    axes.plot(observed[:, 1], color="grey", linestyle=":", label="junction")
    axes.set(xlabel="timestep (cues: dots at 0)", ylim=(-1.2, 1.2))
    axes.set_ylabel("tmaze-500\nflowrl/TMaze-v0", fontsize=7)
    axes.legend(fontsize=7, loc="center")


def main(path: str) -> None:
    figure = Figure(figsize=(7, 1.75 * (len(NAMES) + 1)), layout="constrained")
    grid = figure.add_gridspec(len(NAMES) + 1, len(TIMESTEPS))
    for index, name in enumerate(NAMES):
        row = [figure.add_subplot(grid[index, column]) for column in range(len(TIMESTEPS))]
        for axes in row:
            axes.set(xticks=[], yticks=[])
        draw_robot(row, name)
    draw_tmaze(figure.add_subplot(grid[len(NAMES), :]))
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(sys.argv[1])
