"""What several tests share: one thread for the arithmetic, and a tiny dataset in D4RL's layout."""

import os

# Tensors are tiny: threads of parallel test processes only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on the CPU

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseServer
from typing import Any

import h5py
import numpy as np
import pytest
from failing_server import Server
from tiny_training import train_here

from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.native import kernels

os.fsync = lambda descriptor: None  # in this process alone: what tests kill are processes of their own

EPISODE_LENGTHS = (9, 1, 14, 30, 6)
TERMINATED = (True, True, False, False, True)


def write_tiny_dataset(path: Path, *, seed: int = 0, reward_scale: float = 1.0) -> None:
    """Write 60 steps with Hopper's dimensions: five episodes, one of one step, one constant observation."""
    random, steps = np.random.default_rng(seed), sum(EPISODE_LENGTHS)
    observations = random.normal(size=(steps, 11)).astype(np.float32)
    observations[:, 4] = 3.0
    actions = random.uniform(-1, 1, size=(steps, 3)).astype(np.float32)
    actions[::7] = 1.0
    terminals, timeouts = np.zeros(steps, bool), np.zeros(steps, bool)
    for end, terminated in zip(np.cumsum(EPISODE_LENGTHS) - 1, TERMINATED, strict=True):
        (terminals if terminated else timeouts)[end] = True
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = observations, actions
        file["rewards"] = (reward_scale * random.uniform(0, 3, size=steps)).astype(np.float32)
        file["terminals"], file["timeouts"] = terminals, timeouts


def dataset_of(observations: Any, actions: Any, rewards: Any, lengths: Any, **options: Any) -> EpisodeDataset:
    """Episodes in memory, terminated ones unless ``options`` say otherwise."""
    given = {"terminated": np.ones(len(lengths), bool), "dataset_id": "x", "where": "x", **options}
    arrays = {"observations": observations, "actions": actions, "rewards": rewards}
    return build_episodes(**arrays, episode_lengths=np.array(lengths), **given)


def left_in(folder: Path) -> set[str]:
    """The names of what is in a folder besides lock files."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@contextmanager
def serving(server: BaseServer) -> Iterator[None]:
    """The server answers in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(no_proxy):
    """An HTTP server on this machine."""
    server = Server()
    with serving(server):
        yield server
        server.stopping.set()


@pytest.fixture
def own_folders(tmp_path, monkeypatch, no_proxy):
    """Folders of the test's own instead of the user's, and no network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    urls = ("http://127.0.0.1:9/{file}", "http://127.0.0.1:9/mirror/{file}")  # where nothing listens
    monkeypatch.setattr("flowrl.data.d4rl.D4RL_URLS", urls)
    return tmp_path


HOLD = """
import os, signal, time
fsync = os.fsync
def held(descriptor):
    step = os.readlink(f"/proc/self/fd/{{descriptor}}").partition("/.step-")[2][:8]
    stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)  # flowrl.signals.StopSignals
    for _ in range(10_000):  # 200 s, as long as tests wait
        if not os.path.exists({folder!r} + "/hold" + step) or getattr(stop, "received", None) is not None:
            break
        time.sleep(0.02)
    fsync(descriptor)
os.fsync = held
"""


@pytest.fixture
def held_at_20(tmp_path, monkeypatch):
    """While this file is there, new processes wait for SIGTERM in their checkpoint of update 20."""
    folder = tmp_path / "hold"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOLD.format(folder=str(folder)))
    paths = filter(None, (str(folder), os.environ.get("PYTHONPATH")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    (folder / "hold00000020").touch()
    return folder / "hold00000020"


@pytest.fixture
def unwritten_is_nan():
    """Memory that torch allocates without a value holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unchecked(monkeypatch):
    """As in a new process: no kernel has been checked."""
    monkeypatch.setattr(kernels, "_trusted", {})


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """The path of the file that :func:`write_tiny_dataset` makes; not to be changed."""
    path = tmp_path_factory.mktemp("dataset") / "tiny.hdf5"
    write_tiny_dataset(path)
    return path


@pytest.fixture(scope="session")
def finished(tiny_dataset, tmp_path_factory):
    """A run of 60 updates; not to be changed."""
    return train_here(tiny_dataset, tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture(scope="session")
def unevaluated(tiny_dataset, tmp_path_factory):
    """The same without evaluations."""
    return train_here(tiny_dataset, tmp_path_factory.mktemp("unevaluated") / "run", eval_episodes=0).folder
