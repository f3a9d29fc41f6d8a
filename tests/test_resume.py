"""Runs that are stopped, killed or damaged, and that end bit for bit where an untouched run ends."""

import json
import resource
import shutil
import signal
import time

import pytest
import torch
from conftest import write_tiny_dataset
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import reseal
from tiny_training import (
    arguments,
    assert_same_end,
    figures,
    finish,
    resume_here,
    start,
    steps_on_disk,
    train_here,
    wait_for,
)

import flowrl
from flowrl.errors import UserError
from flowrl.model.checkpoint import load_checkpoint
from flowrl.signals import Stopped
from flowrl.training import trainer
from flowrl.training.trainer import Trainer


@pytest.fixture(scope="module")
def reference(tiny_dataset, tmp_path_factory):
    """60 updates without interruption; not to be changed."""
    run = tmp_path_factory.mktemp("resume") / "reference"
    train_here(tiny_dataset, run)
    return run


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal inside update ``step``."""
    update = Trainer.update

    def interrupted(self):
        update(self)
        if self.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "update", interrupted)


KILL_AFTER = """
import os, signal
from flowrl.training.trainer import Trainer
update = Trainer.update
def killed(self):
    update(self)
    if self.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.update = killed
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "attention": "softmax",
            "token_layout": "fused",
            "context_length": "episode",
            "checkpoint_every": 37,
        },
    ],
    ids=["windows", "episodes"],
)
def test_200_updates_equal_100_a_kill_and_100_more(tiny_dataset, tmp_path, options):
    options = {"steps": 200, "eval_every": 90, **options}
    train_here(tiny_dataset, tmp_path / "straight", **options)
    run = tmp_path / "killed"
    code, _, _ = finish(start(arguments(tiny_dataset, run, **options), KILL_AFTER.format(step=100)))
    assert code == -signal.SIGKILL
    newest = load_checkpoint(run).step
    assert newest == (90 if "checkpoint_every" not in options else 74)
    code, output, _ = finish(start(["--resume", str(run)]))
    assert code == 0
    assert f"resuming {run} at step {newest}" in output
    assert_same_end(run, tmp_path / "straight")


@pytest.mark.parametrize("step", [1, 7, 10, 24, 25, 59])
def test_stopped_at_any_update_a_run_goes_on_exactly(reference, tiny_dataset, tmp_path, monkeypatch, step):
    """On a checkpoint, a log line, an evaluation, or between them; dropout and batches go on in order."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Stopped):
            train_here(tiny_dataset, run)
    assert load_checkpoint(run).step == step
    torch.rand(3)  # whatever else uses random numbers meanwhile
    resume_here(run)
    assert_same_end(run, reference)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_stop_within_seconds_and_no_other_run_gets_in(tiny_dataset, tmp_path, number, code):
    run = tmp_path / "run"
    words = arguments(tiny_dataset, run, steps=1_000_000, checkpoint_every=1_000_000, eval_every=0)
    process = start(words)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(figures(run)) > 3, process)
    with pytest.raises(UserError, match="another process is training in this folder"):
        resume_here(run)
    with pytest.raises(UserError, match="already there and not empty"):
        train_here(tiny_dataset, run)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(number)
    exit_code, output, _ = finish(process)
    assert exit_code == code
    assert time.monotonic() - sent < 10
    step = load_checkpoint(run).step
    assert step > 7
    assert f"stopped at step {step}; continue with --resume {run}" in output
    assert steps_on_disk(run) == ["step-00000000", f"step-{step:08d}"]
    flowrl.load_agent(run)


@pytest.mark.parametrize("at", [25, 60])
def test_an_interrupted_evaluation_is_done_again(reference, tiny_dataset, tmp_path, monkeypatch, at):
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
    assert load_checkpoint(run).step == at
    assert all(line["step"] < at for line in figures(run, "evaluation"))
    resume_here(run)
    assert_same_end(run, reference)


def test_a_run_killed_before_its_first_checkpoint_starts_again(reference, tiny_dataset, tmp_path):
    """Killed while that one is written: nothing to load, nothing lost, and --resume still works."""
    run = tmp_path / "run"
    hook = "import os, signal\nfrom flowrl.model import checkpoint\n"
    hook += "checkpoint.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert finish(start(arguments(tiny_dataset, run), hook))[0] == -signal.SIGKILL
    assert steps_on_disk(run) == [".step-00000000.tmp"]
    resume_here(run)
    assert_same_end(run, reference)
    assert steps_on_disk(run) == steps_on_disk(reference)  # and the rest of the killed one is gone


def test_a_run_whose_checkpoints_are_gone_is_not_started_again(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint in it"):
        resume_here(run)
    assert figures(run) == figures(reference)


def test_a_damaged_checkpoint_makes_the_run_go_back_one(reference, tmp_path, capsys):
    run = shutil.copytree(reference, tmp_path / "run")
    path = run / "checkpoints" / "step-00000060" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    resume_here(run)
    output = capsys.readouterr().out
    assert "step-00000060/training.safetensors: its size or SHA-256 differs" in output
    assert "falling back to the checkpoint at step 50" in output
    assert_same_end(run, reference)


def test_metrics_written_after_the_checkpoint_are_written_again(reference, tmp_path):
    """Lines beyond it, and one cut off in the middle of a write, are dropped."""
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000060")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_bytes(lines.encode() + b'{"kind": "train", "st\xff')
    resume_here(run)
    assert_same_end(run, reference)
    (run / "metrics.jsonl").write_text("nonsense\n" + lines)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not a line of metrics"):
        resume_here(run)


def test_tensorboard_goes_on_without_a_fold(reference, tiny_dataset, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:  # killed between checkpoints, as a crash would
        log = Trainer._log_if_due
        patch.setattr(Trainer, "_log_if_due", lambda self, bar: (log(self, bar), 1 / (self.step - 28))[0])
        with pytest.raises(ZeroDivisionError):
            train_here(tiny_dataset, run)
    resume_here(run)
    events = EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [7, 14, 21, 28, 35, 42, 49, 56, 60]


def test_a_finished_run_evaluates_once_more_and_changes_nothing(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run")
    results = resume_here(run)
    expected = [line["return_mean"] for line in figures(reference, "evaluation")[-2:]]
    assert [float(result.returns.mean()) for result in results] == pytest.approx(expected)
    assert_same_end(run, reference)


def test_a_longer_run_goes_on_where_the_shorter_one_ended(tiny_dataset, tmp_path):
    options = {"schedule": "constant", "warmup_steps": 5, "eval_episodes": 0, "log_every": 10}
    train_here(tiny_dataset, tmp_path / "straight", steps=60, **options)
    train_here(tiny_dataset, tmp_path / "run", steps=30, **options)
    resume_here(tmp_path / "run", steps=60)
    assert_same_end(tmp_path / "run", tmp_path / "straight")


def test_other_data_or_another_model_is_refused(reference, tiny_dataset, tmp_path):
    write_tiny_dataset(tmp_path / "tiny.hdf5", seed=1)
    train_here(tmp_path / "tiny.hdf5", tmp_path / "run", steps=3, eval_episodes=0)
    write_tiny_dataset(tmp_path / "tiny.hdf5", seed=2)
    with pytest.raises(UserError, match=r"trained on file:tiny\.hdf5 .*now holds other data"):
        resume_here(tmp_path / "run")
    with pytest.raises(UserError, match=r"--embed-dim 16: .*--resume cannot change it"):
        resume_here(reference, embed_dim=16)


@pytest.mark.parametrize("damage", ["no random state", "wrong random state", "missing", "shape", "extra"])
def test_a_foreign_training_state_is_refused(reference, tmp_path, damage):
    """Whole by its checksums, but not this optimiser's."""
    run = shutil.copytree(reference, tmp_path / "run")
    folder = run / "checkpoints" / "step-00000060"
    tensors = load_file(folder / "training.safetensors")
    if damage == "no random state":
        del tensors["random.sampler"]
    elif damage == "wrong random state":
        tensors["random.torch"] = torch.zeros(7, dtype=torch.uint8)
    elif damage == "missing":
        del tensors["optimizer.0.exp_avg"]
    elif damage == "shape":
        tensors["optimizer.0.exp_avg"] = torch.zeros(3)
    else:
        tensors["optimizer.999.exp_avg"] = torch.zeros(3)
    save_file(tensors, folder / "training.safetensors")
    reseal(folder)
    with pytest.raises(UserError, match=r"training\.safetensors: not the state of this training"):
        resume_here(run)


def limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_up_costs_nothing_already_saved(tiny_dataset, tmp_path):
    """The metrics and TensorBoard's events grow until no file may: a clear end, then the run goes on."""
    options = {"steps": 1500, "eval_episodes": 0, "checkpoint_every": 100, "log_every": 1}
    run = tmp_path / "run"
    code, _, errors = finish(start(arguments(tiny_dataset, run, **options), limit=limit_files(150_000)))
    assert code == 2
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()[-1:]
    assert str(run) in errors.splitlines()[-1]
    step = load_checkpoint(run, for_training=True).step
    assert step >= 100
    assert not [name for name in steps_on_disk(run) if name.endswith(".tmp")]
    resume_here(run, steps=step + 20)
    assert figures(run)[-1]["step"] == step + 20


def test_a_disk_too_full_for_any_checkpoint_is_said_at_once(tiny_dataset, tmp_path):
    process = start(arguments(tiny_dataset, tmp_path / "run"), limit=limit_files(9_000))
    code, _, errors = finish(process)
    assert code == 2
    assert "cannot save the checkpoint" in errors
    assert figures(tmp_path / "run", "train") == []
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["kind"] == "run"
