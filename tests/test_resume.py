"""Runs that are stopped, killed or damaged, and that end bit for bit where an untouched run ends."""

import signal

import pytest
import torch
from conftest import write_tiny_dataset
from processes import Command, finish, stopped_after, wait_for
from tiny_training import arguments, assert_same_end, figures, resume_here, steps_on_disk, train_here

import flowrl
from flowrl.errors import UserError
from flowrl.model.checkpoint import load_checkpoint
from flowrl.signals import Stopped
from flowrl.training import trainer
from flowrl.training.metrics import read_metrics
from flowrl.training.trainer import Trainer


@pytest.mark.parametrize(
    ("step", "number", "code"), [(1, signal.SIGTERM, 143), (7, signal.SIGINT, 130), (25, signal.SIGTERM, 143)]
)
def test_stopped_at_any_update_a_run_continues_exactly(finished, tiny_dataset, tmp_path, step, number, code):
    """On a checkpoint, a log line, an evaluation, or between them; dropout and batches continue in order."""
    run = tmp_path / "run"
    with stopped_after(step, number) as caught:
        train_here(tiny_dataset, run)
    assert caught.value.code == code
    assert load_checkpoint(run).step == step
    torch.rand(3)  # whatever else uses random numbers meanwhile
    resume_here(run)
    assert_same_end(run, finished)


def test_speeds_after_a_resume_are_of_the_updates_since_then(tiny_dataset, tmp_path, monkeypatch):
    clock, update = [0.0], Trainer.update

    def takes_a_second(self):
        update(self)
        clock[0] += 1

    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Trainer, "update", takes_a_second)
    with stopped_after(10):
        train_here(tiny_dataset, tmp_path / "run")
    resume_here(tmp_path / "run")
    assert {line["updates_per_second"] for line in read_metrics(tmp_path / "run", "train")} == {1.0}


def test_a_signal_saves_and_stops_and_no_other_run_gets_in(tiny_dataset, tmp_path):
    run = tmp_path / "run"
    words = arguments(tiny_dataset, run, steps=1_000_000, checkpoint_every=1_000_000, eval_every=0)
    process = Command(["train", *words])
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(figures(run)) > 3, process)
    with pytest.raises(UserError, match="another process is training in this folder"):
        resume_here(run)
    with pytest.raises(UserError, match="already there and not empty"):
        train_here(tiny_dataset, run)
    assert process.returncode is None
    process.send_signal(signal.SIGTERM)
    code, output, _ = finish(process)
    assert code == 143
    step = load_checkpoint(run).step
    assert step > 7
    assert f"stopped at step {step}; continue with --resume {run}" in output
    assert steps_on_disk(run) == ["step-00000000", f"step-{step:08d}"]
    flowrl.load_agent(run)


@pytest.mark.parametrize("at", [25, 60])
def test_an_interrupted_evaluation_is_done_again(finished, tiny_dataset, tmp_path, monkeypatch, capsys, at):
    run, evaluate, calls = tmp_path / "run", trainer.evaluate, []

    def interrupted(agent, *rest):
        act = agent.act

        def stop(observations, rewards=None):
            calls.append(len(observations))
            if len(calls) == 5:
                signal.raise_signal(signal.SIGTERM)
            return act(observations, rewards)

        if len(figures(run, "evaluation")) == (0 if at == 25 else 4):
            monkeypatch.setattr(agent, "act", stop)
        return evaluate(agent, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        with pytest.raises(Stopped) as caught:
            train_here(tiny_dataset, run)
    assert caught.value.code == 143
    assert len(calls) == 5  # at once, not after the episode
    assert f"stopped at step {at}; continue with --resume {run}" in capsys.readouterr().out
    assert load_checkpoint(run).step == at
    assert all(line["step"] < at for line in figures(run, "evaluation"))
    resume_here(run)
    assert_same_end(run, finished)


def test_a_run_killed_before_its_first_checkpoint_starts_again(finished, tiny_dataset, tmp_path):
    """Killed while that one is written: nothing to load, nothing lost, and --resume still works."""
    run = tmp_path / "run"
    hook = "import os, signal\nfrom flowrl.model import checkpoint\n"
    hook += "checkpoint.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert finish(Command(["train", *arguments(tiny_dataset, run)], hook))[0] == -signal.SIGKILL
    assert steps_on_disk(run) == [".step-00000000.tmp"]
    resume_here(run)
    assert_same_end(run, finished)
    assert steps_on_disk(run) == steps_on_disk(finished)  # and the rest of the killed one is gone


def test_other_data_another_model_or_fewer_updates_are_refused(finished, tiny_dataset, tmp_path):
    write_tiny_dataset(tmp_path / "tiny.hdf5", seed=1)
    train_here(tmp_path / "tiny.hdf5", tmp_path / "run", steps=3, eval_episodes=0)
    write_tiny_dataset(tmp_path / "tiny.hdf5", seed=2)
    with pytest.raises(UserError, match=r"trained on file:tiny\.hdf5 .*now holds other data"):
        resume_here(tmp_path / "run")
    write_tiny_dataset(tmp_path / "moved.hdf5", seed=1)
    resume_here(tmp_path / "run", dataset=tmp_path / "moved.hdf5", steps=4)
    assert steps_on_disk(tmp_path / "run")[-1].endswith("4")
    with pytest.raises(UserError, match=r"--embed-dim 16: .*--resume cannot change it"):
        resume_here(finished, embed_dim=16)
    with pytest.raises(UserError, match=r"--steps 10: .*run has 60 updates already"):
        resume_here(finished, steps=10)
    assert "steps: 60\n" in (finished / "config.yaml").read_text()


def test_a_disk_that_fills_up_costs_nothing_already_saved(tiny_dataset, tmp_path):
    """The metrics and TensorBoard's events grow until no file may: a clear end, then the run continues."""
    options = {"steps": 600, "eval_episodes": 0, "checkpoint_every": 50, "log_every": 1}
    run = tmp_path / "run"
    code, _, errors = finish(Command(["train", *arguments(tiny_dataset, run, **options)], limit=80_000))
    assert code == 2
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()[-1:]
    assert str(run) in errors.splitlines()[-1]
    step = load_checkpoint(run, for_training=True).step
    assert step >= 50
    assert not [name for name in steps_on_disk(run) if name.endswith(".tmp")]
    resume_here(run, steps=step + 20)
    assert figures(run)[-1]["step"] == step + 20
