"""Evaluation: statistics, table, JSON, video and the command line, on an agent that needs no training."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from processes import Command, finish, wait_for
from test_rollout import loop_over_single_environments

from flowrl import load_agent
from flowrl.envs.failures import EnvironmentFailure
from flowrl.envs.reference_scores import REFERENCE_SCORES
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.evaluation import command
from flowrl.evaluation.command import EvaluateConfig, evaluate_run
from flowrl.evaluation.evaluate import TargetResult, episode_seeds, evaluate, format_table, short_number
from flowrl.evaluation.video import make_rendered_env, write_video
from flowrl.report import compare

HOPPER = EnvironmentSpec("Hopper-v5", max_episode_steps=13)


@dataclass
class ConstantAgent:
    """Always the same action, larger for larger targets; carries what a loaded agent carries."""

    environment: EnvironmentSpec | None = HOPPER
    checkpoint_step: int = 50
    acting: str = "recurrent"
    conditioning: str = "return-to-go"
    config = SimpleNamespace(
        reference=REFERENCE_SCORES["hopper"],
        dataset_id="hopper-medium",
        dataset_sha256="c0ffee",
        targets=(600.0, 0.0),
        chosen_by="",
        model=SimpleNamespace(observation_dim=11, action_dim=3, action_choices=()),
    )
    targets: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def reset(self, num_envs, target_return):
        self.targets = np.broadcast_to(np.asarray(target_return, dtype=np.float64), num_envs)

    def act(self, observations, rewards=None):
        return np.repeat(self.targets[:, None] / 1000, 3, axis=1).astype(np.float32)

    def keep(self, indices):
        self.targets = self.targets[indices]


def test_every_target_has_the_same_starts_and_more_episodes_begin_with_the_same():
    seeds = np.random.SeedSequence(40).generate_state(5)
    np.testing.assert_array_equal(episode_seeds(40, 3), seeds[:3])
    results = evaluate(ConstantAgent(), HOPPER, [600.0, 0.0], 3, 40, REFERENCE_SCORES["hopper"])
    assert [result.target_return for result in results] == [600.0, 0.0]
    for result in results:
        targets = [result.target_return] * 3
        returns, lengths, _ = loop_over_single_environments(ConstantAgent(), HOPPER, targets, seeds[:3])
        np.testing.assert_allclose(result.returns, returns, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(result.lengths, lengths)


def test_figures_are_those_of_the_textbook():
    scores = np.array([10.0, 20.0, 60.0])
    result = TargetResult(3600.0, np.array([1.0, 2.0, 6.0]), np.array([10, 20, 60]), scores)
    assert result.to_dict() == {
        "target_return": 3600.0,
        "episodes": 3,
        "returns": [1.0, 2.0, 6.0],
        "lengths": [10, 20, 60],
        "normalized_scores": [10.0, 20.0, 60.0],
        "return_mean": 3.0,
        "return_std": pytest.approx(math.sqrt(7.0)),
        "return_standard_error": pytest.approx(math.sqrt(7.0 / 3.0)),
        "length_mean": 30.0,
        "normalized_score_mean": 30.0,
        "normalized_score_std": pytest.approx(10 * math.sqrt(7.0)),
        "normalized_score_standard_error": pytest.approx(10 * math.sqrt(7.0 / 3.0)),
    }
    table = format_table([result, TargetResult(1800.0, np.array([5.0]), np.array([7]), None)])
    rows = [" ".join(line.split()) for line in table.splitlines()[1:3]]
    assert rows == ["3600 3 3.0 +/- 2.6 (1.5) 30.0 30.0 +/- 26.5 (15.3)", "1800 1 5.0 7.0 no reference"]
    successes = np.array([True, False, True, True])
    result = TargetResult(1.0, np.ones(4), np.ones(4, dtype=np.int64), None, successes)
    figures = result.to_dict()
    assert (figures["success_rate"], figures["successes"]) == (0.75, [True, False, True, True])
    header, row, *_ = format_table([result]).splitlines()
    assert (header.split()[-1], row.split()[-1]) == ("success_rate", "0.75")


def test_evaluate_run_prints_and_writes(finished, tmp_path, capsys):
    results = tmp_path / "new" / "results.json"
    options = {"checkpoint": 50, "acting": "recurrent", "conditioning": "target", "source_clamp": 20.0}
    evaluate_run(EvaluateConfig(finished, episodes=2, json=results, device="cpu", **options))
    config = load_agent(finished).config
    printed, data = capsys.readouterr().out, f"file:tiny.hdf5 sha256 {config.dataset_sha256[:12]}"
    assert f"environment Hopper-v4(max_episode_steps=15), dataset {data}, acting recurrent, " in printed
    assert "conditioned on the target, checkpoint 50" in printed
    document = json.loads(results.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["environment"] == json.loads(json.dumps(asdict(config.environment)))
    assert document["versions"]["gymnasium"] == gym.__version__
    run_options = yaml.safe_load((finished / "config.yaml").read_text()) | {"source_clamp": 20.0}
    given = {"config": run_options, "dataset_id": "file:tiny.hdf5"}
    given |= {"dataset_sha256": config.dataset_sha256, "acting": "recurrent", "conditioning": "target"}
    given |= {"checkpoint_step": 50, "seed": 0}
    assert {name: document[name] for name in given} == given
    assert [target["target_return"] for target in document["targets"]] == [30.0, 5.0]
    assert list(results.parent.iterdir()) == [results]


def test_a_sweep_of_targets_names_the_best_one_as_hindsight(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_agent", lambda *_, **__: ConstantAgent())
    evaluate_run(EvaluateConfig(tmp_path, episodes=2, targets="sweep", json=tmp_path / "x.json"))
    results = json.loads((tmp_path / "x.json").read_text())["targets"]
    low = REFERENCE_SCORES["hopper"].minimum
    expected = [low + share * (600 - low) for share in np.linspace(0, 1.25, 11)]
    np.testing.assert_allclose([result["target_return"] for result in results], expected, atol=1e-5)
    best = max(results, key=lambda result: result["return_mean"])["target_return"]
    assert f"highest mean return at target {best:g}: chosen with hindsight" in capsys.readouterr().out


def test_two_agents_are_compared_episode_by_episode(monkeypatch, capsys, tmp_path):
    shifted = ConstantAgent()
    shifted.config = SimpleNamespace(**{**vars(ConstantAgent.config), "targets": (0.0,)})
    shifted.environment = replace(HOPPER, imports=("json",), kwargs={})
    agents = {"first": ConstantAgent(), "second": shifted}
    monkeypatch.setattr(compare, "load_agent", lambda run, **_: agents[str(run)])
    text = compare.compare(compare.CompareConfig(Path("first"), Path("second"), episodes=10, seed=3))
    loops = (
        loop_over_single_environments(ConstantAgent(), HOPPER, [target] * 10, episode_seeds(3, 10))
        for target in (600.0, 0.0)
    )
    scores = [REFERENCE_SCORES["hopper"].normalized_score(returns) for returns, *_ in loops]
    assert f"First - second: {short_number((scores[0] - scores[1]).mean())}, 95% interval" in text
    for values in scores:
        assert f"{values.mean():.1f} ± {short_number(values.std(ddof=1) / 10**0.5)}" in text
    capsys.readouterr()
    options = {"episodes": 10, "env_import": ("json",)}
    same = compare.compare(compare.CompareConfig(Path("first"), Path("first"), **options))
    assert capsys.readouterr().out == "importing json for Hopper-v5\n" * 2
    assert "First - second: 0.0, 95% interval 0.0 to 0.0: within the noise" in same
    shifted.environment = replace(HOPPER, env_id="Hopper-v4")
    with pytest.raises(UserError, match=r"environments, Hopper-v5\(max_episode_steps=13\) and Hopper-v4\("):
        compare.compare(compare.CompareConfig(Path("first"), Path("second")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "evaluate", Mock(side_effect=EnvironmentFailure("broken")))
    with pytest.raises(UserError, match=r"broken; its traceback is in environment-error\.txt"):
        compare.compare(compare.CompareConfig(Path("first"), Path("first")))
    assert [short_number(value) for value in (0.0, 0.034, -0.5, 12.34)] == ["0.0", "0.034", "-0.5", "12.3"]


def test_video_holds_one_episode_per_target_side_by_side(tmp_path):
    import imageio_ffmpeg

    path = tmp_path / "film.mp4"
    write_video(path, ConstantAgent(), HOPPER, [600.0, 0.0], seed=1)
    assert list(tmp_path.iterdir()) == [path]
    assert "triton" in sys.modules  # loaded after Mesa's copy of LLVM it would end the process
    # The first picture, every second step and the last one of each episode.
    seeds = [int(episode_seeds(1, 1)[0])] * 2
    _, lengths, _ = loop_over_single_environments(ConstantAgent(), HOPPER, (600.0, 0.0), seeds)
    drawn = len({*range(0, max(lengths) + 1, 2), *lengths})
    decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    film = subprocess.run(decode, capture_output=True)
    frames = np.frombuffer(film.stdout, np.uint8).reshape(-1, 480, 960, 3).astype(float)
    assert (len(frames), b" 960x480" in film.stderr.partition(b"Output #0")[0]) == (drawn, True)
    first, last = frames[0], frames[-1]
    for half in (first[:, :480], first[:, 480:]):
        assert half.std() > 10  # a picture, not one colour
    robot, caption = slice(80, None), slice(0, 80)
    assert abs(first[robot, :480] - first[robot, 480:]).mean() < 4  # the same start, compressed
    assert abs(first[caption, :480] - first[caption, 480:]).max() > 100  # two targets
    assert abs(last[robot, :480] - last[robot, 480:]).max() > 100  # two ways of acting
    asked = (slice(4, 32), slice(480, 640))  # the second target's line, the same in every frame
    assert abs(last[asked] - first[asked]).mean() < 4


def test_an_environment_without_pictures_is_refused_before_it_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_agent", lambda *_, **__: ConstantAgent())
    monkeypatch.setattr(command, "evaluate", lambda *_: pytest.fail("evaluated"))
    monkeypatch.setattr(HopperEnv, "render", lambda _: None)
    with pytest.raises(UserError, match="--video: the environment draws no pictures"):
        evaluate_run(EvaluateConfig(tmp_path, video=tmp_path / "x.mp4"))


def test_an_environment_that_fails_while_it_is_filmed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(HopperEnv, "step", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"Hopper-v5 failed at a step: ZeroDivisionError"):
        write_video(tmp_path / "film.mp4", ConstantAgent(), HOPPER, [600.0], seed=1)
    assert list(tmp_path.iterdir()) == []


def test_robots_are_drawn_as_in_their_own_environment():
    env = make_rendered_env(EnvironmentSpec("flowrl/HopperHidden-v0"))
    plain = make_rendered_env(EnvironmentSpec("Hopper-v5"))
    for each in (env, plain):
        each.reset(seed=1)
    np.testing.assert_array_equal(env.render(), plain.render())
    assert env.metadata["render_fps"] == plain.metadata["render_fps"] == 125
    env.close()
    plain.close()


SLOW_EVALUATION = """
import sys, time
from flowrl.evaluation import command
from test_evaluate import ConstantAgent

class Slow(ConstantAgent):
    def act(self, *arguments):
        print("acting", flush=True)
        time.sleep(1)
        return super().act(*arguments)

command.load_agent = lambda *_, **__: Slow()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_an_evaluation_and_leave_nothing(tmp_path, number, code):
    words = ["evaluate", "run", "--targets", "0", "--json", str(tmp_path / "results.json")]
    process = Command(words, SLOW_EVALUATION)
    wait_for(lambda: "acting" in process.output, process)
    process.send_signal(number)
    assert finish(process)[0] == code
    assert list(tmp_path.iterdir()) == []
