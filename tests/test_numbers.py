"""Numbers stay finite: extreme returns, constant observations, actions at their bounds; both precisions."""

import numpy as np
import pytest
from conftest import write_tiny_dataset
from tiny_training import figures, train_here

from flowrl import load_agent
from flowrl.data import load_episodes


@pytest.fixture(scope="module")
def extreme(tmp_path_factory):
    path = tmp_path_factory.mktemp("extreme") / "extreme.hdf5"
    write_tiny_dataset(path, reward_scale=3000.0)
    dataset = load_episodes(str(path), "Hopper-v4")
    assert dataset.returns_to_go.max() > 1e5
    assert np.ptp(dataset.observations[:, 4]) == 0
    assert (np.abs(dataset.actions).max(axis=1) == 1).any()
    return path


@pytest.mark.parametrize(
    ("layout", "attention", "precision"),
    [
        ("interleaved", "flow", "bfloat16"),
        ("fused", "flow", "float32"),
        ("interleaved", "softmax", "float32"),
    ],
)
def test_300_updates_and_acting_stay_finite(extreme, tmp_path, layout, attention, precision):
    """Whole episodes; unscaled returns of 1e5 enter the network as they are, so do targets beyond them."""
    train_here(
        extreme, tmp_path / "run", token_layout=layout, attention=attention, precision=precision,
        context_length="episode", return_scale=1, steps=300, log_every=50, checkpoint_every=300,
        eval_episodes=0,
    )  # fmt: skip
    lines = figures(tmp_path / "run", "train")
    assert np.isfinite([line["gradient_norm"] for line in lines]).all()
    assert lines[-1]["loss"] < lines[0]["loss"]  # it fell
    for acting in ("recurrent", "window"):
        agent, random = load_agent(tmp_path / "run", acting=acting), np.random.default_rng(0)
        agent.reset(4, np.array([1e5, -1e5, 1e15, 0.0]))
        for step in range(60):
            observations = random.normal(size=(4, 11)) * np.array([[1.0], [1e6], [1e15], [0.0]])
            rewards = None if step == 0 else random.normal(size=4) * np.array([1e5, 1e15, 1.0, 0.0])
            actions = agent.act(observations, rewards)
            assert np.isfinite(actions).all()
            assert (np.abs(actions) <= 1).all()
