"""Training batches: windows gathered by index from an :class:`EpisodeDataset` on the training device."""

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowrl.data.dataset import EpisodeDataset
from flowrl.native.library import native_library
from flowrl.ranks import ALONE, Ranks

SOURCE = Path(__file__).with_name("gather.cpp")


class Batch(NamedTuple):
    """``batch`` windows of one episode each, padded on the right to the longest; in the data's units.

    Padding repeats the window's last transition; only ``valid`` timesteps count.
    """

    observations: Tensor  # (batch, length, observation_dim) float32
    actions: Tensor  # (batch, length, action_dim) float32
    previous_actions: Tensor  # (batch, length, action_dim), meaningless where timesteps is 0
    returns_to_go: Tensor  # (batch, length) float32
    timesteps: Tensor  # (batch, length) int64
    valid: Tensor  # (batch, length) bool
    spans: Tensor  # (batch, 2) int64 on the CPU: each window's first transition in the dataset, and its end
    num_timesteps: int  # valid ones, those of other ranks included
    share: float  # of num_timesteps that are in this batch; 1 but for several ranks


class WindowSampler:
    """Draws windows of ``context_length`` timesteps; an episode no longer than that is taken whole.

    A window may begin before its episode or end after it, and loses what lies outside: every timestep of an
    episode is in as many windows as any other. (Were starts uniform over transitions, as in the Decision
    Transformer's code, an episode's first timestep would be in one window, its twentieth in twenty; but it is
    the first ones that acting begins with.) Long episodes weigh by their length.

    Random numbers come from a generator of the sampler's own on the CPU, so that batches are the same on
    every device; :attr:`generator_state` is all there is to save. Of several ranks each draws the whole
    batch, and gathers its own share of the windows.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        context_length: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.context_length = context_length
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.ranks = ranks
        self._generator = torch.Generator().manual_seed(seed)
        self._windows = _every_window(dataset, context_length)  # (windows, 3) int32: 12 bytes a transition
        self.num_windows = len(self._windows)
        self._drawn = torch.empty(batch_size, dtype=torch.int64)
        self._numbers = self._drawn.numpy()  # the same memory
        self._action_dim = dataset.action_dim
        self._observation_dim = dataset.observation_dim
        self._library = gather_library() if self.device.type == "cpu" else None
        self._arrays = (dataset.observations, dataset.actions, dataset.returns_to_go)  # read in place
        self._places = [array.ctypes.data for array in self._arrays]
        if self._library is not None:
            return
        # Without C++ all but the observations, by far the widest, lie in one row for each transition, so that
        # a batch takes two gathers.
        self._observations, self._others = dataset.observations, _packed(dataset)
        if self.device.type == "cuda":
            tables = (self._observations, self._others)
            self._on_device = tuple(torch.from_numpy(table).to(self.device) for table in tables)

    @property
    def generator_state(self) -> Tensor:
        """The random state, (bytes,) uint8; assign it back to draw the same batches again."""
        return self._generator.get_state()

    @generator_state.setter
    def generator_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def sample(self) -> Batch:
        """Draw the next batch."""
        self._drawn.random_(self.num_windows, generator=self._generator)
        return self.gather(self._numbers)

    def gather(self, numbers: np.ndarray) -> Batch:
        """Return this rank's share of the windows with these (batch,) numbers, below ``num_windows``."""
        # In NumPy, whose calls take half as long as torch's on arrays as small as these.
        windows = self._windows.take(numbers, axis=0)
        lengths = windows[:, 1] - windows[:, 0]
        num_timesteps, share = int(lengths.sum()), 1.0
        if self.ranks.size > 1:
            windows = np.ascontiguousarray(windows[self.ranks.mine])
            lengths = lengths[self.ranks.mine]
            share = int(lengths.sum()) / num_timesteps
        arrays = self._copied if self._library is not None else self._indexed
        spans = torch.from_numpy(windows[:, :2].astype(np.int64))
        observations, actions, previous_actions, returns_to_go, timesteps, valid = arrays(
            windows, int(lengths.max())
        )
        return Batch(
            observations=observations,
            actions=actions,
            previous_actions=previous_actions,
            returns_to_go=returns_to_go,
            timesteps=timesteps,
            valid=valid,
            spans=spans,
            num_timesteps=num_timesteps,
            share=share,
        )

    def _copied(self, windows: np.ndarray, length: int) -> list[Tensor]:
        """The first six entries of a batch of (batch, 3) windows, the longest of this length, by C++."""
        batch, observation_dim, action_dim = len(windows), self._observation_dim, self._action_dim
        outputs = [
            torch.empty(batch, length, observation_dim),
            torch.empty(batch, length, action_dim),
            torch.empty(batch, length, action_dim),
            torch.empty(batch, length),
            torch.empty(batch, length, dtype=torch.int64),
            torch.empty(batch, length, dtype=torch.bool),
        ]
        assert self._library is not None
        self._library.gather_windows(
            *(batch, length, observation_dim, action_dim),
            torch.from_numpy(windows).data_ptr(),
            *self._places,
            *(output.data_ptr() for output in outputs),
        )
        return outputs

    def _indexed(self, windows: np.ndarray, length: int) -> list[Tensor]:
        """The same by index, on any device."""
        starts, ends, first_timesteps = windows.astype(np.int64)[:, :, None].transpose(1, 0, 2)
        steps, lengths = np.arange(length), ends - starts  # lengths are (batch, 1)
        offsets = np.minimum(steps, lengths - 1)  # (batch, length)
        timesteps, valid = self._to_device(offsets + first_timesteps), self._to_device(steps < lengths)
        return [*self._rows(offsets + starts), timesteps, valid]

    def _rows(self, index: np.ndarray) -> list[Tensor]:
        """Observations, actions, previous actions and returns-to-go of the transitions (batch, length)."""
        width = self._action_dim
        if self.device.type == "cuda":
            places = self._to_device(index)
            observations, others = (table[places] for table in self._on_device)
            return [observations, others[..., :width], others[..., width:-1], others[..., -1]]
        observed, rest = self._observations.take(index, axis=0), self._others.take(index, axis=0)
        parts = (observed, rest[..., :width], rest[..., width:-1], rest[..., -1])
        return [torch.from_numpy(part) for part in parts]

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


@cache
def gather_library() -> ctypes.CDLL | None:
    """The C++ that copies windows; None where it cannot be built."""
    library = native_library(SOURCE, ("gather_windows",))
    if library is not None:
        library.gather_windows.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 10
    return library


def _every_window(dataset: EpisodeDataset, context_length: int) -> np.ndarray:
    """Return every window that may be drawn: (windows, 3) int32 first transition, end, first timestep."""
    starts, lengths = dataset.episode_starts, dataset.episode_lengths
    whole = lengths <= context_length
    counts = lengths + np.where(whole, 0, context_length - 1)
    episode = np.repeat(np.arange(len(lengths)), counts)
    first = (
        np.arange(counts.sum()) - (counts.cumsum() - lengths)[episode]
    )  # timestep, below 0 before episodes
    last = np.where(whole[episode], lengths[episode], np.minimum(first + context_length, lengths[episode]))
    first = np.where(whole[episode], 0, first.clip(min=0))
    return np.stack((starts[episode] + first, starts[episode] + last, first), axis=1).astype(np.int32)


def _packed(dataset: EpisodeDataset) -> np.ndarray:
    """(N, 2 action_dim + 1) float32: of each transition its action, the one before it, the return-to-go."""
    previous = np.concatenate((dataset.actions[:1], dataset.actions[:-1]))
    return np.concatenate((dataset.actions, previous, dataset.returns_to_go[:, None]), axis=1)
