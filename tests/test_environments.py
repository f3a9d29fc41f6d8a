"""Reference scores, environment specifications and the options that change them."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.wrappers import RescaleAction, TimeAwareObservation
from tiny_training import arguments, train_here

from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.spaces import check_environment, environment_facts
from flowrl.envs.specs import EnvironmentSpec, named_environment
from flowrl.envs.vector import EnvironmentUnavailable, make_env
from flowrl.errors import UserError
from flowrl.evaluation.command import EvaluateConfig, evaluate_run
from flowrl.model.checkpoint import load_checkpoint
from flowrl.model.loading import load_agent
from flowrl.training.run import run_train


@pytest.mark.parametrize(
    ("env_id", "episode_return", "score"),
    [
        # Worked out by hand from D4RL's table.
        ("Hopper-v4", 3234.3, 100.0),
        ("Hopper-v5", -20.272305, 0.0),
        ("HalfCheetah-v4", 5927.4105235, 50.0),
        ("Walker2d-v4", 1.629008 - 45.90670992, -1.0),
        ("Ant-v4", 3879.7 + 42.053, 101.0),
        ("AdroitHandPen-v1", 96.262799, 0.0),
        ("AdroitHandDoor-v1", 2880.5693087298737, 100.0),
        ("AntMaze_UMaze-v4", 0.5, 50.0),
        ("AntMaze_Large_Diverse_GR-v5", 1.0, 100.0),
        ("FrankaKitchen-v1", 3.0, 75.0),
    ],
)
def test_normalized_scores(env_id, episode_return, score):
    assert reference_scores(env_id).normalized_score(episode_return) == pytest.approx(score, abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_recorded_wrappers_are_applied_innermost_first():
    recorded = TimeAwareObservation(RescaleAction(gymnasium.make("Pendulum-v1"), -5.0, 5.0))
    env = make_env(EnvironmentSpec.from_gymnasium_json(recorded.spec.to_json()))
    assert (env.action_space.low, env.action_space.high) == (-5.0, 5.0)
    for each in (env, recorded):
        each.reset(seed=0)
    for action in (5.0, -2.5, 0.0):
        ours, theirs = (each.step(np.array([action], np.float32)) for each in (env, recorded))
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
    assert ours[0].shape == (4,)  # with the time


@pytest.mark.parametrize("wrapper", [("NormalizeObservation", {}), ("MyAction", {}), ("RescaleAction", None)])
def test_wrappers_that_cannot_be_applied_are_refused_by_name(wrapper):
    with pytest.raises(EnvironmentUnavailable, match=f"recorded with the wrapper {wrapper[0]}, which cannot"):
        make_env(EnvironmentSpec("Pendulum-v1", wrappers=(wrapper,)))


def test_an_entry_point_in_a_file_is_never_used():
    spec = json.loads(gymnasium.spec("Pendulum-v1").to_json())
    spec["entry_point"] = "subprocess:run"
    spec["additional_wrappers"] = [{"name": "ClipAction", "entry_point": "os:system", "kwargs": {}}]
    loaded = EnvironmentSpec.from_gymnasium_json(json.dumps(spec))
    assert loaded == EnvironmentSpec("Pendulum-v1", {}, 200, wrappers=(("ClipAction", {}),))
    check_environment(loaded, 3, 1)  # Gymnasium's own Pendulum and ClipAction


NAN = '{"id": "Hopper-v4", "kwargs": {"a": NaN}}'


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"id": 4}', '{"id": "os:x-v0"}', '{"id": "Hopper-v4", "kwargs": ["a"]}', "[" * 100_000, NAN],
)
def test_broken_gymnasium_json_is_refused(text):
    with pytest.raises(UserError, match="environment"):
        EnvironmentSpec.from_gymnasium_json(text)


MODULE = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

class Weak(PendulumEnv):
    def __init__(self, torque=0.5, **kwargs):
        super().__init__(**kwargs)
        self.max_torque = torque
        self.action_space = gymnasium.spaces.Box(-torque, torque, (1,))

gymnasium.register("{name}/Weak-v0", Weak)
"""


def forget(module: str) -> None:
    """As in a new process: the module is not imported, its environment not registered."""
    sys.modules.pop(module, None)
    gymnasium.registry.pop(f"{module}/Weak-v0", None)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of an importable module that registers an environment with keywords and no time limit."""
    name = f"registers_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    forget(name)


def test_an_environment_of_a_module_is_imported_when_it_is_named_or_made(module):
    env_id = f"{module}/Weak-v0"
    expected = EnvironmentSpec(env_id, imports=(module,))
    assert named_environment(f"{module}:{env_id}") == expected
    assert named_environment(env_id, (module,)) == expected
    forget(module)
    facts = environment_facts(EnvironmentSpec(env_id, {"torque": 3.0}, imports=(module,)))
    assert (facts.action_bounds[1].tolist(), facts.max_episode_steps) == ([3.0], None)


def pendulum_data(path: Path, largest_action: float = 0.5) -> Path:
    """Two episodes of 8 steps with Pendulum's dimensions, in D4RL's layout."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"], file["rewards"] = random.normal(size=(16, 3)), random.normal(size=16)
        file["actions"] = random.uniform(-largest_action, largest_action, (16, 1))
        file["terminals"], file["timeouts"] = np.zeros(16, bool), np.arange(16) % 8 == 7
    return path


def test_a_run_remembers_how_its_environment_is_made(module, tmp_path, capsys):
    env_id, run = f"{module}/Weak-v0", tmp_path / "run"
    options = {"env": f"{module}:{env_id}", "max_episode_steps": None, "steps": 5}
    words = arguments(pendulum_data(tmp_path / "data.hdf5"), run, **options)
    run_train([*words, "--env-kwargs", '{"torque": 0.25}', "--reference-scores", "-100", "0"])
    output = capsys.readouterr().out
    assert f"{env_id} has no time limit: evaluated for at most 16 steps" in output
    assert "43.8% of the actions are outside the bounds" in output
    assert "evaluated in" not in output
    assert "no reference" not in output

    forget(module)
    agent = load_agent(run)  # imports nothing
    assert module not in sys.modules
    assert agent.environment == EnvironmentSpec(env_id, {"torque": 0.25}, 16, (module,))
    agent.reset(1, 0.0)
    assert abs(float(agent.act(np.zeros((1, 3)))[0, 0])) <= 0.25
    evaluate_run(EvaluateConfig(run=run, episodes=2, json=tmp_path / "scores.json", max_episode_steps=5))
    document = json.loads((tmp_path / "scores.json").read_text())
    assert document["environment"] == {
        **json.loads(json.dumps(asdict(agent.environment))),
        "max_episode_steps": 5,
    }
    assert document["targets"][0]["lengths"] == [5, 5]
    returns, scores = document["targets"][0]["returns"], document["targets"][0]["normalized_scores"]
    np.testing.assert_allclose(scores, np.array(returns) + 100)
    assert f"importing {module} for {env_id}" in capsys.readouterr().out

    forget(module)
    run_train(["--resume", str(run), "--steps", "6"])
    forget(module)
    capsys.readouterr()
    evaluate_run(EvaluateConfig(run=run, episodes=2, env=f"{module}:{env_id}"))  # as it was trained in
    assert f"environment {env_id}(torque=0.25, max_episode_steps=16), dataset" in capsys.readouterr().out
    train_here(tmp_path / "data.hdf5", tmp_path / "elsewhere", env="Pendulum-v1", steps=1, eval_episodes=0)
    with pytest.raises(UserError, match="has no time limit: give --max-episode-steps"):
        evaluate_run(EvaluateConfig(run=tmp_path / "elsewhere", episodes=2, env=f"{module}:{env_id}"))


def test_actions_of_another_scaling_are_refused(tmp_path):
    data = pendulum_data(tmp_path / "data.hdf5", largest_action=100.0)
    with pytest.raises(UserError, match=r"9\d.*% of the actions .* another environment or scaling"):
        train_here(data, tmp_path / "run", env="Pendulum-v1")
    assert not (tmp_path / "run").exists()


def test_an_environment_that_fails_costs_no_update(tmp_path, monkeypatch):
    def step(self, action):
        raise FloatingPointError("unstable")

    monkeypatch.setattr(PendulumEnv, "step", step)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"Pendulum-v1 failed at step 0: FloatingPointError: unstable; its"):
        train_here(pendulum_data(tmp_path / "data.hdf5"), run, env="Pendulum-v1", steps=7, eval_every=0)
    assert "FloatingPointError: unstable" in (run / "environment-error.txt").read_text()
    assert load_checkpoint(run).step == 7
