"""Behaviour policies: the numpy actor against torch, damaged snapshots refused, measured returns."""

import gymnasium
import numpy as np
import pytest
import torch
from export_behavior import BehaviorExport, export_behavior, measure_returns, save_policy
from safetensors.numpy import load_file, save

from flowrl.behavior.policy import ACTION_GRID, BehaviorPolicy, load_policy
from flowrl.behavior.shipped import ASSETS_DIR, behavior_assets, behavior_names, load_behavior
from flowrl.errors import UserError


def make_policy(
    observation_dim: int = 11, action_dim: int = 3, seed: int = 0, steps: int = 7
) -> BehaviorPolicy:
    generator = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
        # Values that float16 holds exactly, so that a round trip in any type must give them back.
        weight = generator.normal(size=(inputs, outputs)).astype(np.float16) / 4
        return weight.astype(np.float64), generator.normal(size=outputs).astype(np.float16).astype(np.float64)

    hidden = (layer(observation_dim, 16), layer(16, 8))
    return BehaviorPolicy("Hopper-v5", steps, hidden, layer(8, action_dim), layer(8, action_dim))


def torch_actor(policy: BehaviorPolicy, observations: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The same actor built from torch's own layers, in float64."""

    def linear(weight: np.ndarray, bias: np.ndarray) -> torch.nn.Linear:
        module = torch.nn.Linear(*weight.shape, dtype=torch.float64)
        module.load_state_dict({"weight": torch.tensor(weight.T), "bias": torch.tensor(bias)})
        return module

    body = torch.nn.Sequential(*[m for layer in policy.hidden for m in (linear(*layer), torch.nn.ReLU())])
    with torch.no_grad():
        features = body(torch.tensor(observations, dtype=torch.float64))
        log_std = linear(*policy.log_std)(features).clamp(-20, 2)
        return linear(*policy.mean)(features), log_std


def test_distribution_and_mode_equal_torch():
    policy = make_policy()
    observations = np.random.default_rng(1).normal(size=(50, 11)) * 5
    mean, log_std = torch_actor(policy, observations)
    assert (log_std == 2).any()
    assert (log_std < 2).any()
    numpy_mean, numpy_log_std = policy.distribution(observations)
    np.testing.assert_allclose(numpy_mean, mean.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(numpy_log_std, log_std.numpy(), rtol=0, atol=1e-12)
    actions = policy.act(observations, 0.0)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, torch.tanh(mean).numpy(), rtol=0, atol=ACTION_GRID / 2 + 1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_snapshot_round_trip(tmp_path, dtype):
    policy = make_policy()
    save_policy(policy, tmp_path / "policy.safetensors", dtype)
    loaded = load_policy(tmp_path / "policy.safetensors")
    np.testing.assert_equal(vars(loaded), vars(policy))
    assert [path.name for path in tmp_path.iterdir()] == ["policy.safetensors"]


def test_damaged_snapshots_are_refused_by_name(tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(make_policy(), path)
    tensors, whole = load_file(path), path.read_bytes()
    metadata = {"env_id": "Hopper-v5", "steps": "7"}
    contents = [
        *(whole[:500], b"\x80\x04K\x01.", save(tensors)),  # cut off; a pickle; of no environment
        save({name: x for name, x in tensors.items() if name != "hidden.1.bias"}, metadata),
        save({**tensors, "log_std.bias": np.zeros(2, np.float32)}, metadata),
        save({**tensors, "mean.weight": np.zeros((5, 3), np.float32)}, metadata),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"policy\.safetensors: not a readable behaviour policy"):
            load_policy(path)
    with pytest.raises(UserError, match="not a readable behaviour policy"):
        load_policy(tmp_path / "none.safetensors")


def test_tampered_and_unknown_assets_are_refused(tmp_path):
    for steps in (0, 50):
        save_policy(make_policy(seed=steps, steps=steps), tmp_path / f"run/snapshots/{steps:09d}.safetensors")
    assets = tmp_path / "assets"
    export_behavior(BehaviorExport(tmp_path / "run", ("random=0", "medium=50"), 3, assets))
    assert load_behavior("hopper", "medium", assets).steps == 50
    with pytest.raises(UserError, match="did you mean 'medium'"):
        load_behavior("hopper", "mediun", assets)
    path = assets / "hopper" / "medium.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        load_behavior("hopper", "medium", assets)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_behavior("hopper", "medium", assets)


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
