"""Random episode sets as D4RL file, Minari dataset and arrays in memory: one form; windows stay inside it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

from flowrl.data.d4rl import read_d4rl_file
from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.data.minari import read_minari

pytestmark = pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks

ID = "test/random-v0"
ARRAYS = ("observations", "actions", "rewards", "returns_to_go", "timesteps")
OFFSETS = ("episode_starts", "episode_lengths", "terminated")

# The same examples on every machine: a failure here is never bad luck.
PROPERTY = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)


@dataclass(frozen=True)
class EpisodeSet:
    """Episodes of ``lengths`` steps that end by ``endings``; numbers follow from ``seed`` and ``scale``."""

    lengths: tuple[int, ...]
    endings: tuple[str, ...]  # terminal, timeout, both; the last one may be unfinished
    observation_dim: int = 3
    action_dim: int = 2
    seed: int = 0
    scale: float = 1.0
    special: tuple[float, ...] = ()  # the first rewards, as they come

    def arrays(self) -> dict[str, np.ndarray]:
        """Float64 columns of all steps, one episode after another."""
        random, steps = np.random.default_rng(self.seed), sum(self.lengths)
        rewards = self.scale * random.normal(size=steps)
        rewards[: len(self.special)] = self.special[:steps]
        return {
            "observations": self.scale * random.normal(size=(steps, self.observation_dim)),
            "actions": random.uniform(-1, 1, size=(steps, self.action_dim)),
            "rewards": rewards,
        }

    def flags(self) -> dict[str, np.ndarray]:
        terminals, timeouts = np.zeros(sum(self.lengths), bool), np.zeros(sum(self.lengths), bool)
        for end, ending in zip(np.cumsum(self.lengths) - 1, self.endings, strict=True):
            terminals[end], timeouts[end] = ending in ("terminal", "both"), ending in ("timeout", "both")
        return {"terminals": terminals, "timeouts": timeouts}

    @property
    def terminated(self) -> list[bool]:
        return [ending in ("terminal", "both") for ending in self.endings]


@st.composite
def episode_sets(draw: st.DrawFn) -> EpisodeSet:
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 9), st.just(1000)), min_size=1, max_size=6))
    endings = [draw(st.sampled_from(("terminal", "timeout", "both"))) for _ in lengths]
    if draw(st.booleans()):
        endings[-1] = "unfinished"
    return EpisodeSet(
        lengths=tuple(lengths),
        endings=tuple(endings),
        observation_dim=draw(st.integers(1, 5)),
        action_dim=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**32 - 1)),
        scale=draw(st.sampled_from((0.0, 1e-30, 1.0, 1e4, 1e30))),
        special=tuple(draw(st.lists(st.floats(-1e37, 1e37), max_size=4))),
    )


DTYPES = st.sampled_from(("<f4", ">f4", "<f8", ">f8"))
STORAGE = st.sampled_from(
    (
        {},
        {"compression": "gzip", "shuffle": True},
        {"compression": "lzf"},
        {"chunks": True, "fletcher32": True},
        {"maxshape": None, "chunks": True, "compression": "gzip"},
    )
)
FLAG_DTYPES = st.sampled_from((bool, np.uint8, np.dtype(">f4"), np.int64))


def in_memory(episodes: EpisodeSet) -> EpisodeDataset:
    lengths, terminated = np.array(episodes.lengths), np.array(episodes.terminated)
    arrays = episodes.arrays()
    return build_episodes(
        **arrays, episode_lengths=lengths, terminated=terminated, dataset_id="memory", where="memory"
    )


def through_d4rl(
    episodes: EpisodeSet, folder: Path, dtype: str, flag_dtype: Any, storage: dict[str, Any]
) -> EpisodeDataset:
    path = folder / "episodes.hdf5"
    columns = {key: values.astype(dtype) for key, values in episodes.arrays().items()}
    columns |= {key: values.astype(flag_dtype) for key, values in episodes.flags().items()}
    columns["next_observations"] = columns["observations"][::-1]  # ignored
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            options = dict(storage)
            if "maxshape" in options:
                options["maxshape"] = (None, *values.shape[1:])
            file.create_dataset(key, data=values, **options)
    return read_d4rl_file(path)


def through_minari(episodes: EpisodeSet, folder: Path, dtype: type) -> EpisodeDataset:
    """T + 1 observations an episode; the last one is used by nobody, so it may be anything."""
    arrays, flags, buffers, start = episodes.arrays(), episodes.flags(), [], 0
    for index, length in enumerate(episodes.lengths):
        steps = slice(start, start + length)
        final = np.full((1, episodes.observation_dim), np.nan if index % 2 else 7.0)
        buffers.append(
            EpisodeBuffer(
                observations=np.concatenate((arrays["observations"][steps], final)).astype(dtype),
                actions=arrays["actions"][steps].astype(dtype),
                rewards=arrays["rewards"][steps].tolist(),
                terminations=flags["terminals"][steps].tolist(),
                truncations=flags["timeouts"][steps].tolist(),
            )
        )
        start += length
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers(
            ID,
            buffers,
            observation_space=spaces.Box(-np.inf, np.inf, (episodes.observation_dim,), dtype),
            action_space=spaces.Box(-1.0, 1.0, (episodes.action_dim,), dtype),
        )
        return read_minari(ID)


@PROPERTY
@given(episodes=episode_sets(), dtype=DTYPES, flag_dtype=FLAG_DTYPES, storage=STORAGE, wide=st.booleans())
@example(EpisodeSet((1,), ("unfinished",)), "<f4", bool, {}, True)
@example(EpisodeSet((1, 1, 1), ("both", "terminal", "timeout")), ">f8", np.uint8, {"chunks": True}, False)
@example(EpisodeSet((1000, 1, 1000), ("timeout", "both", "unfinished")), ">f4", bool, {}, True)
def test_file_minari_and_memory_agree(
    episodes: EpisodeSet, dtype: str, flag_dtype: Any, storage: dict[str, Any], wide: bool
) -> None:
    event(f"last episode {episodes.endings[-1]}")
    memory = in_memory(episodes)
    with tempfile.TemporaryDirectory() as folder:
        from_file = through_d4rl(episodes, Path(folder), dtype, flag_dtype, storage)
        from_minari = through_minari(episodes, Path(folder), np.float64 if wide else np.float32)
    for other in (from_file, from_minari):
        for name in (*ARRAYS, *OFFSETS):
            ours, theirs = getattr(memory, name), getattr(other, name)
            assert ours.dtype == theirs.dtype, name
            assert ours.dtype.isnative
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert other.sha256 == memory.sha256
    unfinished = episodes.endings[-1] == "unfinished"
    assert any("without terminal or timeout" in note for note in from_file.notes) == unfinished
