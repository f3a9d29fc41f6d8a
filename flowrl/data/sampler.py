"""Training batches: windows gathered by index from an :class:`EpisodeDataset` on the training device."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowrl.data.episodes import EpisodeDataset
from flowrl.ranks import ALONE, Ranks


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
        self._windows = _every_window(dataset, context_length)  # (windows, 2) int32: 8 bytes a transition
        self.num_windows = len(self._windows)
        self._observations = torch.from_numpy(dataset.observations).to(self.device)
        self._actions = torch.from_numpy(dataset.actions).to(self.device)
        self._returns_to_go = torch.from_numpy(dataset.returns_to_go).to(self.device)
        self._timesteps = torch.from_numpy(dataset.timesteps).to(self.device)

    @property
    def generator_state(self) -> Tensor:
        """The random state, (bytes,) uint8; assign it back to draw the same batches again."""
        return self._generator.get_state()

    @generator_state.setter
    def generator_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def sample(self) -> Batch:
        """Draw the next batch."""
        numbers = torch.randint(self.num_windows, (self.batch_size,), generator=self._generator)
        return self.gather(numbers)

    def gather(self, numbers: Tensor) -> Batch:
        """Return this rank's share of the windows with these (batch,) numbers, below ``num_windows``."""
        spans = self._windows.index_select(0, numbers).long()
        lengths = spans[:, 1] - spans[:, 0]
        num_timesteps = int(lengths.sum())
        if self.ranks.size > 1:
            spans, lengths = spans[self.ranks.mine], lengths[self.ranks.mine]
        offsets = torch.arange(int(lengths.max()))
        valid = self._to_device(offsets < lengths[:, None])  # (batch, length)
        index = self._to_device(spans[:, :1] + torch.minimum(offsets, lengths[:, None] - 1))
        return Batch(
            observations=_rows(self._observations, index),
            actions=_rows(self._actions, index),
            previous_actions=_rows(self._actions, (index - 1).clamp(min=0)),
            returns_to_go=_rows(self._returns_to_go, index),
            timesteps=_rows(self._timesteps, index),
            valid=valid,
            spans=spans,
            num_timesteps=num_timesteps,
            share=int(lengths.sum()) / num_timesteps if self.ranks.size > 1 else 1.0,
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def _every_window(dataset: EpisodeDataset, context_length: int) -> Tensor:
    """Return the (windows, 2) int32 first transition and end of every window that may be drawn."""
    starts, lengths = dataset.episode_starts, dataset.episode_lengths
    whole = lengths <= context_length
    counts = lengths + np.where(whole, 0, context_length - 1)
    episode = np.repeat(np.arange(len(lengths)), counts)
    first = (
        np.arange(counts.sum()) - (counts.cumsum() - lengths)[episode]
    )  # timestep, below 0 before episodes
    last = np.where(whole[episode], lengths[episode], np.minimum(first + context_length, lengths[episode]))
    first = np.where(whole[episode], 0, first.clip(min=0))
    spans = starts[episode, None] + np.stack((first, last), axis=1)
    return torch.from_numpy(spans.astype(np.int32))


def _rows(array: Tensor, index: Tensor) -> Tensor:
    """``array[index]`` for a (batch, length) index: index_select copies whole rows, several times faster."""
    return array.index_select(0, index.flatten()).view(*index.shape, *array.shape[1:])
