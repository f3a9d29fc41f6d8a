"""Two processes under torchrun compute what one computes, resume exactly, and share out evaluations."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from processes import REPOSITORY, Command, finish, wait_for
from tiny_training import arguments, assert_same_end, figures, resume_here, steps_on_disk, train_here

from flowrl.data.sampler import WindowSampler
from flowrl.errors import UserError
from flowrl.model.checkpoint import load_checkpoint
from flowrl.ranks import Ranks
from flowrl.training.config import parse_train_config
from flowrl.training.setup import load_dataset

SAME = {"dropout": 0.0, "steps": 30, "batch_size": 7, "eval_episodes": 3, "log_every": 1}


def start_two(words: list[str]) -> list[Command]:
    """Two processes with what torchrun puts into their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        Command(["train", *words], f"import os; os.environ.update({ {**group, 'RANK': str(rank)} })")
        for rank in (0, 1)
    ]


def run_two(words: list[str]) -> None:
    for code, output, errors in map(finish, start_two(words)):
        assert code == 0, (output + errors)[:3000]


def run_under_torchrun(words: list[str]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *launcher, str(REPOSITORY / "scripts" / "train.py"), *words],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


@pytest.mark.parametrize(
    ("run_both", "options"),
    [(run_under_torchrun, {}), (run_two, {"context_length": "episode", "token_layout": "fused"})],
)
def test_two_processes_are_one_with_the_doubled_batch(tiny_dataset, tmp_path, run_both, options):
    """The whole batch is 7 windows: 4 of them in one process, 3 in the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_here(tiny_dataset, one, **SAME, **options)
    run_both(arguments(tiny_dataset, two, **SAME, **options))
    losses = [[line["loss"] for line in figures(run, "train")] for run in (one, two)]
    assert len(losses[0]) == 30
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    weights = [load_checkpoint(run, for_training=True).model for run in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4)
    # Acting with those weights differs in the last digits, which a falling robot amplifies.
    for ours, theirs in zip(*(figures(run, "evaluation") for run in (two, one)), strict=True):
        assert ours["return_mean"] == pytest.approx(theirs["return_mean"], rel=0.05)
        assert ours["length_mean"] == pytest.approx(theirs["length_mean"], rel=0.05)


def test_a_killed_pair_resumes_exactly(tiny_dataset, tmp_path):
    """With dropout, whose random numbers are each process' own."""
    options = {"steps": 120, "eval_every": 0, "eval_episodes": 2, "dropout": 0.2}
    run_two(arguments(tiny_dataset, tmp_path / "reference", **options))
    run = tmp_path / "run"
    both = start_two(arguments(tiny_dataset, run, **options))
    wait_for(lambda: (run / "checkpoints" / "step-00000020").exists(), both[0])
    for process in both:
        process.send_signal(signal.SIGKILL)
    for process in both:
        process.communicate()
    assert "step-00000120" not in steps_on_disk(run)
    run_two(["--resume", str(run)])
    assert_same_end(run, tmp_path / "reference")
    with pytest.raises(UserError, match="trained by 2 processes and has to be resumed by as many, not by 1"):
        resume_here(run, steps=130)


def test_a_signal_to_one_process_is_the_exit_code_of_all(tiny_dataset, tmp_path):
    """Without torchrun's own ways of ending its processes: it is given to the second alone."""
    run = tmp_path / "run"
    both = start_two(arguments(tiny_dataset, run, steps=100_000, eval_every=0, checkpoint_every=50_000))
    wait_for(lambda: len(figures(run)) > 3 if (run / "metrics.jsonl").exists() else False, both[0])
    both[1].send_signal(signal.SIGTERM)
    assert [finish(process)[0] for process in both] == [128 + signal.SIGTERM] * 2
    assert load_checkpoint(run, for_training=True).step > 0


def test_torchruns_environment_without_other_processes_is_one_error(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = finish(Command(["train", *arguments(tiny_dataset, tmp_path / "run")]))
    assert code == 2
    assert "cannot find one another" in errors


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_draw_the_same_batches_and_share_them_out(tiny_dataset, tmp_path, size):
    dataset = load_dataset(parse_train_config(arguments(tiny_dataset, tmp_path / "run")))
    whole = WindowSampler(dataset, 6, 7, seed=3)
    parts = [WindowSampler(dataset, 6, 7, seed=3, ranks=Ranks(rank, size)) for rank in range(size)]
    for _ in range(5):
        batch, shares = whole.sample(), [part.sample() for part in parts]
        assert sorted(batch.spans.tolist()) == sorted(torch.cat([share.spans for share in shares]).tolist())
        assert sum(share.share for share in shares) == pytest.approx(1)
        for share in shares:
            assert share.num_timesteps == batch.num_timesteps
            assert int(share.window.valid.sum()) == pytest.approx(share.share * batch.num_timesteps)
