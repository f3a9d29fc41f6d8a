"""Draw what critics predict beside the returns that the data's episodes have: results/guidance.png.

python scripts/maintain/critic_curves.py results/guidance.png hopper-medium walker2d-medium-replay ...
"""

from pathlib import Path

import numpy as np
import torch
import tyro

from flowrl.atomic import atomic_path
from flowrl.data.embedded import load_embedded
from flowrl.data.returns import observed_returns
from flowrl.errors import exit_on_user_error
from flowrl.report.plots import new_figure
from flowrl.training.config import TrainConfig
from flowrl.training.guidance import halves, learn_critics
from flowrl.training.setup import build_agent

SEED = 0
UNKNOWN = 200  # last timesteps of truncated episodes, whose returns lack what follows


def draw(picture: tyro.conf.Positional[Path], names: tyro.conf.Positional[tuple[str, ...]]) -> None:
    """For each of flowrl's datasets the best episode and the median one; print the correlation over all."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(4 * columns, 2.8 * rows)
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        dataset = load_embedded(name)
        model = build_agent(TrainConfig(env=name), dataset).model
        critics = learn_critics(dataset, model, SEED)
        unseen, lengths = ~halves(dataset, SEED), dataset.episode_lengths  # (members, episodes), (episodes,)
        returns = observed_returns(dataset, dataset.rewards)
        returns = (returns - returns.mean()) / returns.std()
        with torch.no_grad():
            observations = model.normalize_observations(torch.from_numpy(dataset.observations))
            actions = model.normalize_actions(torch.from_numpy(dataset.actions))
            values = critics.action_values(observations, actions).numpy()  # (members, transitions)
        unseen_steps = np.repeat(unseen, lengths, axis=1)
        counts = unseen_steps.sum(axis=0)
        predicted = (values * unseen_steps).sum(axis=0) / np.maximum(counts, 1)
        left = np.concatenate([np.arange(length, 0, -1) for length in lengths])
        known = (counts > 0) & (np.repeat(dataset.terminated, lengths) | (left > UNKNOWN))
        correlation = np.corrcoef(predicted[known], returns[known])[0, 1]
        print(f"{name}: correlation {correlation:.2f} over {known.sum()} timesteps", flush=True)
        ranked = [e for e in np.argsort(-dataset.episode_returns) if unseen[:, e].any()]
        for color, episode in (("C0", ranked[0]), ("C1", ranked[len(ranked) // 2])):
            start, length = dataset.episode_starts[episode], lengths[episode]
            shown = np.flatnonzero(known[start : start + length])
            axes.plot(shown, returns[start + shown], color=color, alpha=0.7)
            axes.plot(shown, predicted[start + shown], color=color, linestyle="--")
        axes.set_title(f"{name}, correlation {correlation:.2f}", fontsize=9)
        axes.set_xlabel("timestep", fontsize=8)
        axes.set_ylabel("discounted return, standardised", fontsize=8)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(draw)
