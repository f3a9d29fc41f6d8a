"""Numbers stay finite: extreme returns, constant observations, actions at their bounds; both precisions."""

import numpy as np
import pytest
import torch
from conftest import write_tiny_dataset

from flowrl.data import EpisodeDataset, load_episodes
from flowrl.data.sampler import WindowSampler
from flowrl.training.config import TrainConfig
from flowrl.training.setup import build_agent

UPDATES = 300


@pytest.fixture(scope="module")
def extreme(tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    path = tmp_path_factory.mktemp("extreme") / "extreme.hdf5"
    write_tiny_dataset(path, reward_scale=3000.0)
    dataset = load_episodes(str(path), "Hopper-v4")
    assert dataset.returns_to_go.max() > 1e5
    assert np.ptp(dataset.observations[:, 4]) == 0
    assert (np.abs(dataset.actions).max(axis=1) == 1).any()
    return dataset


@pytest.mark.parametrize(
    ("layout", "attention", "precision"),
    [
        ("interleaved", "flow", "bfloat16"),
        ("fused", "flow", "float32"),
        ("fused", "flow", "bfloat16"),
        ("interleaved", "softmax", "float32"),
    ],
)
def test_300_updates_stay_finite(
    extreme: EpisodeDataset, layout: str, attention: str, precision: str
) -> None:
    """Whole episodes; unscaled returns of 1e5 enter the network as they are."""
    torch.manual_seed(0)
    config = TrainConfig(
        attention=attention,  # type: ignore[arg-type]
        token_layout=layout,  # type: ignore[arg-type]
        context_length="episode",
        return_scale=1.0,
        embed_dim=8,
        num_heads=2,
        num_layers=2,
    )
    agent = build_agent(config, extreme)
    model = agent.model.train()
    sampler = WindowSampler(extreme, agent.config.context_length, batch_size=4, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    losses = []
    for _ in range(UPDATES):
        batch = sampler.sample()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model.loss(batch.window)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        assert loss.isfinite()
        assert norm.isfinite()  # NaN or infinite if any gradient is
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    assert np.mean(losses[-50:]) < np.mean(losses[:50])  # it went somewhere


@pytest.mark.parametrize("acting", ["recurrent", "window"])
def test_acting_on_extremes_stays_finite_and_in_bounds(extreme: EpisodeDataset, acting: str) -> None:
    """Targets of 1e5 and beyond, observations far from any seen: actions are finite and inside the bounds."""
    torch.manual_seed(0)
    config = TrainConfig(
        context_length="episode", embed_dim=8, num_heads=2, num_layers=2, acting=acting, return_scale=1.0
    )  # type: ignore[arg-type]
    agent = build_agent(config, extreme)
    random = np.random.default_rng(0)
    agent.reset(4, np.array([1e5, -1e5, 1e15, 0.0]))
    for step in range(60):
        observations = random.normal(size=(4, 11)) * np.array([[1.0], [1e6], [1e15], [0.0]])
        rewards = None if step == 0 else random.normal(size=4) * np.array([1e5, 1e15, 1.0, 0.0])
        actions = agent.act(observations, rewards)
        assert np.isfinite(actions).all()
        assert (np.abs(actions) <= 1).all()
