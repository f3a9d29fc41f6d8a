"""Behaviour policies: the numpy actor against torch, damaged assets refused, measured returns."""

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_behavior import BehaviorExport, export_behavior, measure_returns, save_policy

from flowrl.behavior import shipped
from flowrl.behavior.policy import ACTION_GRID, BehaviorPolicy
from flowrl.behavior.shipped import ASSETS_DIR, behavior_assets, behavior_names, load_behavior
from flowrl.errors import UserError


def make_policy(seed: int = 0, steps: int = 7) -> BehaviorPolicy:
    generator = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
        return generator.normal(size=(inputs, outputs)) / 4, generator.normal(size=outputs)

    return BehaviorPolicy("Hopper-v5", steps, (layer(11, 16), layer(16, 8)), layer(8, 3), layer(8, 3))


def test_distribution_and_mode_equal_torch():
    policy = make_policy()
    observations = np.random.default_rng(1).normal(size=(50, 11)) * 5

    def linear(x: torch.Tensor, weight: np.ndarray, bias: np.ndarray) -> torch.Tensor:
        return F.linear(x, torch.tensor(weight.T), torch.tensor(bias))

    features = torch.tensor(observations)
    for layer in policy.hidden:
        features = linear(features, *layer).relu()
    mean, log_std = linear(features, *policy.mean), linear(features, *policy.log_std).clamp(-20, 2)
    assert (log_std == 2).any()
    assert (log_std < 2).any()
    numpy_mean, numpy_log_std = policy.distribution(observations)
    np.testing.assert_allclose(numpy_mean, mean.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(numpy_log_std, log_std.numpy(), rtol=0, atol=1e-12)
    actions = policy.act(observations, 0.0)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, torch.tanh(mean).numpy(), rtol=0, atol=ACTION_GRID / 2 + 1e-9)


def test_tampered_and_unknown_assets_are_refused(tmp_path, monkeypatch):
    for steps in (0, 50):
        save_policy(make_policy(seed=steps, steps=steps), tmp_path / f"run/snapshots/{steps:09d}.safetensors")
    assets = tmp_path / "assets"
    export_behavior(BehaviorExport(tmp_path / "run", ("random=0", "medium=50"), 3, assets))
    monkeypatch.setattr(shipped, "ASSETS_DIR", assets)
    assert load_behavior("hopper", "medium").steps == 50
    with pytest.raises(UserError, match="did you mean 'medium'"):
        load_behavior("hopper", "mediun")
    path = assets / "hopper" / "medium.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        load_behavior("hopper", "medium")
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_behavior("hopper", "medium")


def test_every_shipped_policy_loads_and_fits_its_environment():
    assert behavior_names() == sorted(path.name for path in ASSETS_DIR.iterdir())
    for environment in behavior_names():
        for name, asset in behavior_assets(environment).items():
            policy = load_behavior(environment, name)
            assert (policy.env_id, policy.steps) == (asset.env_id, asset.training_steps)
            spaces = gymnasium.make(asset.env_id)
            assert spaces.observation_space.shape == (policy.observation_dim,)
            assert isinstance(spaces.action_space, gymnasium.spaces.Box)
            assert spaces.action_space.shape == (policy.action_dim,)
            # The policy's [-1, 1] is the environment's own range.
            np.testing.assert_array_equal(spaces.action_space.high, np.ones(policy.action_dim))
            np.testing.assert_array_equal(spaces.action_space.low, -np.ones(policy.action_dim))


@pytest.mark.parametrize("name", ["random", "medium"])
def test_a_shipped_hopper_policy_earns_what_its_index_says(name):
    asset = behavior_assets("hopper")[name]
    policy = load_behavior("hopper", name)
    measured = measure_returns(policy, asset.episodes, seed=5)  # not the seed of the index
    standard_error = float(np.hypot(asset.return_std, measured.std)) / asset.episodes**0.5
    assert measured.mean == pytest.approx(asset.return_mean, abs=4 * standard_error)
