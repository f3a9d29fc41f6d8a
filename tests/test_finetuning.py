"""Online fine-tuning: what is collected, what is replayed, and the same end after any interruption."""

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import stopped_after
from tiny_training import assert_same_end, figures, flags, resume_here, steps_on_disk, train_here

import flowrl
from flowrl.data import load_episodes
from flowrl.data.dataset import concatenate
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env
from flowrl.errors import UserError
from flowrl.finetuning import trainer as online
from flowrl.finetuning.command import _default_folder, run_finetune
from flowrl.finetuning.config import FinetuneConfig, training_of
from flowrl.finetuning.trainer import collect_episodes
from flowrl.model.agent import Agent
from flowrl.model.checkpoint import load_checkpoint
from flowrl.report.runs import load_runs
from flowrl.signals import Stopped

OPTIONS = {
    "steps": 30,
    "updates_per_round": 10,
    "episodes_per_round": 3,
    "replay_timesteps": 90,
    "eval_every": 15,
    "eval_episodes": 2,
    "checkpoint_every": 7,
    "log_every": 4,
    "device": "cpu",
}


def finetune(run, run_dir, **options):
    return run_finetune([str(run), "--run-dir", str(run_dir), *flags({**OPTIONS, **options})])


def resume(run_dir, *flags):
    return run_finetune(["--resume", str(run_dir), *flags])


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """A run of a few updates; not to be changed."""
    run = tmp_path_factory.mktemp("finetuning") / "trained"
    return train_here(tiny_dataset, run, max_episode_steps=None, steps=3, eval_episodes=0).folder


@pytest.fixture(scope="module")
def reference(trained, tmp_path_factory):
    """A fine-tuning without interruption; not to be changed."""
    return finetune(trained, tmp_path_factory.mktemp("finetuned") / "reference").folder


@pytest.mark.parametrize("step", [10, 24])
def test_stopped_at_any_update_it_continues_exactly(reference, trained, tmp_path, step):
    """At the end of a round, and in one after the replay has dropped episodes."""
    with stopped_after(step):
        finetune(trained, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run").step == step
    torch.rand(3)  # whatever else uses random numbers meanwhile
    resume(tmp_path / "run")
    assert_same_end(tmp_path / "run", reference)


def test_a_round_that_is_stopped_is_collected_anew(reference, trained, tmp_path, monkeypatch, capsys):
    """The first one, after some of its actions were drawn."""
    rollout, calls = online.rollout, []

    def interrupted(*arguments):
        record = arguments[-1]

        def stop(*step):
            calls.append(step)
            if len(calls) == 4:
                signal.raise_signal(signal.SIGINT)
            record(*step)

        return rollout(*arguments[:-1], stop)

    with monkeypatch.context() as patch:
        patch.setattr(online, "rollout", interrupted)
        with pytest.raises(Stopped):
            finetune(trained, tmp_path / "run")
    assert not figures(tmp_path / "run", "round")
    assert f"stopped at step 0; continue with --resume {tmp_path / 'run'}" in capsys.readouterr().out
    resume(tmp_path / "run")
    assert_same_end(tmp_path / "run", reference)


def test_a_damaged_checkpoint_takes_the_run_back_one_and_its_replay_as_well(reference, tmp_path, capsys):
    run = shutil.copytree(reference, tmp_path / "run")
    path = run / "checkpoints" / "step-00000030" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    resume(run)
    assert "falling back to the checkpoint at step 28" in capsys.readouterr().out
    assert_same_end(run, reference)


def test_collected_episodes_are_what_the_environment_and_the_agent_did(trained):
    """Each action, taken again in one environment, gives the observation and reward beside it; returns-to-go
    are the sums of what followed, and without noise the actions are those of the model over the episode."""
    loaded = flowrl.load_agent(trained)
    environment, targets = EnvironmentSpec("Hopper-v4"), np.array([30.0, 5.0, 90.0])
    episodes = collect_episodes(Agent(loaded.model, loaded.config, noise=0.3), environment, targets, seed=7)
    plain = collect_episodes(loaded, environment, targets, seed=7)
    assert not np.array_equal(episodes.actions[0], plain.actions[0])
    env = make_env(environment)
    for episode, seed in enumerate(np.random.SeedSequence(7).generate_state(3)):
        start = episodes.episode_starts[episode]
        rows = slice(start, start + episodes.episode_lengths[episode])
        observation, _ = env.reset(seed=int(seed))
        rewards = []
        for index in range(rows.start, rows.stop):
            np.testing.assert_array_equal(episodes.observations[index], observation.astype(np.float32))
            observation, reward, terminated, *_ = env.step(episodes.actions[index])
            rewards.append(reward)
        assert terminated == episodes.terminated[episode]
        np.testing.assert_allclose(episodes.rewards[rows], rewards, rtol=1e-6)
        sums = [sum(rewards[start:]) for start in range(len(rewards))]
        np.testing.assert_allclose(episodes.returns_to_go[rows], sums, rtol=1e-5)
        assert 0 < np.abs(episodes.actions[start] - plain.actions[plain.episode_starts[episode]]).max() < 1.5


def test_every_round_has_starts_of_its_own_and_the_replay_holds_the_best_of_all(
    trained, tiny_dataset, tmp_path, monkeypatch
):
    rounds = []

    def kept(*arguments):
        rounds.append(collect_episodes(*arguments))
        return rounds[-1]

    monkeypatch.setattr(online, "collect_episodes", kept)
    notes = []
    monkeypatch.setattr(online, "concatenate", lambda both: notes.append(both[0].notes) or concatenate(both))
    finetune(trained, tmp_path / "run", steps=21, eval_episodes=0)
    assert notes == notes[:1] * 3
    starts = np.concatenate([episodes.observations[episodes.episode_starts] for episodes in rounds])
    assert len(np.unique(starts, axis=0)) == 3 * 3
    lines = figures(tmp_path / "run", "round")
    collected = np.cumsum([episodes.num_transitions for episodes in rounds])
    assert [line["timesteps"] for line in lines] == collected.tolist()
    tensors = load_checkpoint(tmp_path / "run", for_training=True).training_tensors
    lengths = tensors["replay.episode_lengths"]
    assert len(tensors["replay.rewards"]) == lengths.sum() <= 90
    returns = sorted(part.sum().item() for part in tensors["replay.rewards"].split(lengths.tolist()))
    seen = np.concatenate([data.episode_returns for data in (load_episodes(str(tiny_dataset)), *rounds)])
    assert len(seen) == 5 + 3 * 3 > len(returns)
    np.testing.assert_allclose(returns, np.sort(seen)[-len(returns) :], rtol=1e-5)
    assert lines[-1]["replay_return_mean"] == pytest.approx(np.mean(returns))


def test_other_commands_take_the_result(reference, tmp_path, capsys):
    assert [line["step"] for line in figures(reference, "round")] == [1, 11, 21]
    assert [line["step"] for line in figures(reference, "evaluation")][::2] == [0, 15, 30]
    assert flowrl.load_agent(reference).config.dataset_id == "file:tiny.hdf5 + online"
    (run,), unfinished = load_runs([reference])
    assert not unfinished
    assert run.dataset == "file:tiny.hdf5 + online"
    with pytest.raises(UserError, match="was fine-tuned; continue it with flowrl finetune --resume"):
        resume_here(reference)
    assert finetune(reference, tmp_path / "again", steps=1).step == 1
    resume(tmp_path / "again", "--steps", "3")
    assert steps_on_disk(tmp_path / "again")[-1] == "step-00000003"
    for flag, value in (("--noise", "0.5"), ("--conditioning", "target")):
        with pytest.raises(UserError, match=rf"{flag} {value}: .*--resume cannot change it"):
            resume(tmp_path / "again", flag, value)
    with pytest.raises(UserError, match=r"--run-dir elsewhere: --resume continues in .*again"):
        resume(tmp_path / "again", "--run-dir", "elsewhere")
    with pytest.raises(UserError, match=r"--steps 2: .*again has 3 updates already"):
        resume(tmp_path / "again", "--steps", "2")
    resumed = resume(tmp_path / "again", "--steps", "4", "--targets", "70")
    assert [result.target_return for result in resumed.results] == [70.0]
    assert flowrl.load_agent(tmp_path / "again").config.targets == (70.0,)


def test_evaluation_seed_and_best_checkpoint_are_not_inherited(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run")
    text = (run / "config.yaml").read_text().replace("eval_seed: null", "eval_seed: 7")
    text = text.replace("keep_best: null", "keep_best: return_mean")
    (run / "config.yaml").write_text(text.replace("eval_episodes: 0", "eval_episodes: 2"))
    for resumed in (None, run):
        training = training_of(FinetuneConfig(run=run, seed=3, resume=resumed), run)
        assert (training.eval_seed, training.keep_best) == (None, None)
    monkeypatch.chdir(run)
    assert _default_folder(Path(), 3) == tmp_path / "run-online-seed3"


def test_the_environments_options_do_not_change_how_the_runs_data_is_read(trained, tmp_path, monkeypatch):
    read = []  # the options of each reading
    monkeypatch.setattr("flowrl.finetuning.command.load_dataset", lambda config: read.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(trained, tmp_path / "other", max_episode_steps=5)
    assert read[0].max_episode_steps is None


def test_what_cannot_be_fine_tuned_is_one_line(trained, tmp_path):
    with pytest.raises(UserError, match="give a run folder to start from, or --resume"):
        run_finetune([])
    with pytest.raises(UserError, match=r"nowhere: not a run folder, it has no config\.yaml"):
        finetune(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(UserError, match=r"not the folder of a fine-tuning, it has no finetune\.yaml"):
        resume(trained)
    with pytest.raises(UserError, match=r"Walker2d-v4 has observations of 17 and actions of 6"):
        finetune(trained, tmp_path / "run", env="Walker2d-v4")
    with pytest.raises(UserError, match="--updates-per-round 0"):
        finetune(trained, tmp_path / "run", updates_per_round=0)
    in_memory = shutil.copytree(trained, tmp_path / "in_memory")
    path = in_memory / "config.yaml"
    path.write_text(re.sub(r"- .*tiny\.hdf5", "- toy", path.read_text()))
    with pytest.raises(UserError, match=r"unknown dataset 'toy'.*the data of .*in_memory may be"):
        finetune(in_memory, tmp_path / "run")
    cloned = shutil.copytree(trained, tmp_path / "cloned")
    path = cloned / "config.yaml"
    path.write_text(path.read_text().replace("agent: transformer", "agent: bc"))
    with pytest.raises(UserError, match="behaviour cloning aims at no return"):
        finetune(cloned, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="already there and not empty"):
        finetune(trained, trained)
