"""Training batches: windows of episodes, drawn at random and gathered by index."""

from typing import NamedTuple
from warnings import catch_warnings

import numpy as np
import torch
from torch import Tensor

from flowrl.data.arrays import release
from flowrl.data.dataset import EpisodeDataset
from flowrl.ranks import ALONE, Ranks
from flowrl.window import Window

# On CUDA, windows are padded to a multiple of this share of the context, so that few CUDA graphs replay them.
LENGTHS_PER_CONTEXT = 8


class Batch(NamedTuple):
    """The windows of one update that this rank computes, and what they are of."""

    window: Window
    spans: Tensor  # (batch, 2) int64 on the CPU: each window's first transition in the dataset, and its end
    num_timesteps: int  # valid ones, those of other ranks included
    share: float  # of num_timesteps that are in this batch; 1 but for several ranks


class WindowSampler:
    """Draws windows of ``context_length`` timesteps; an episode no longer than that is taken whole.

    A window may begin before its episode or end after it, and loses what lies outside: every timestep of an
    episode is in as many windows as any other. (If starts were uniform over transitions, as in the Decision
    Transformer's code, an episode's first timestep would be in one window, its twentieth in twenty; but it is
    the first ones that acting begins with.) Long episodes weigh by their length. Padding repeats the window's
    last transition.

    Random numbers come from a generator of the sampler's own on the CPU, so that batches are the same on
    every device; the state of ``generator`` is all there is to save. Of several ranks each draws the whole
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
        self.generator = torch.Generator().manual_seed(seed)
        self.draw_from(dataset)

    def draw_from(self, dataset: EpisodeDataset) -> None:
        """Draw the next batches from this data, with the random numbers that come next."""
        self._starts, self._lengths = dataset.episode_starts, dataset.episode_lengths
        overhang = np.where(self._lengths <= self.context_length, 0, self.context_length - 1)
        self._windows_so_far = np.cumsum(self._lengths + overhang)  # (E,) of this episode and those before
        self.num_windows = int(self._windows_so_far[-1])
        self._arrays = (dataset.observations, dataset.actions, dataset.returns_to_go)
        with catch_warnings(action="ignore", category=UserWarning):  # a map is read-only; nothing writes here
            self._tables = [torch.from_numpy(array) for array in self._arrays]
        if _fits(self._tables, self.device):
            self._tables = [table.to(self.device) for table in self._tables]

    def sample(self) -> Batch:
        """Draw the next batch."""
        drawn = torch.empty(self.batch_size, dtype=torch.int64)
        return self.gather(drawn.random_(self.num_windows, generator=self.generator).numpy())

    def gather(self, numbers: np.ndarray) -> Batch:
        """Return this rank's share of the windows with these (batch,) numbers, below ``num_windows``."""
        starts, ends, first_timesteps = self._spans(numbers)
        lengths = ends - starts
        num_timesteps, share = int(lengths.sum()), 1.0
        if self.ranks.size > 1:
            mine = self.ranks.mine
            starts, ends, first_timesteps, lengths = (
                x[mine] for x in (starts, ends, first_timesteps, lengths)
            )
            share = int(lengths.sum()) / num_timesteps
        steps = np.arange(self._padded_length(int(lengths.max())))
        offsets = np.minimum(steps, lengths[:, None] - 1)  # (batch, length)
        window = self._window(
            offsets + starts[:, None], offsets + first_timesteps[:, None], steps < lengths[:, None]
        )
        return Batch(window, torch.from_numpy(np.stack((starts, ends), axis=1)), num_timesteps, share)

    def _spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First transition, end and first timestep of the windows with these numbers, each (batch,) int64."""
        episodes = np.searchsorted(self._windows_so_far, numbers, side="right")
        lengths = self._lengths[episodes]
        whole = lengths <= self.context_length
        # Counted back from the episode's last window, whose first timestep is the episode's last one.
        first = lengths - (self._windows_so_far[episodes] - numbers)  # below 0: begins before the episode
        last = np.where(whole, lengths, np.minimum(first + self.context_length, lengths))
        first = np.where(whole, 0, first.clip(min=0))
        return self._starts[episodes] + first, self._starts[episodes] + last, first

    def _padded_length(self, longest: int) -> int:
        if self.device.type != "cuda":
            return longest
        multiple = -(-self.context_length // LENGTHS_PER_CONTEXT)
        return min(-(-longest // multiple) * multiple, self.context_length)

    def _window(self, transitions: np.ndarray, timesteps: np.ndarray, valid: np.ndarray) -> Window:
        """Gather (batch, length) transitions where the tables are, and bring them to the device."""
        index = self._on(torch.from_numpy(transitions), self._tables[0].device)
        observations, actions, returns_to_go = self._tables
        gathered = (
            *(observations[index], actions[index], actions[(index - 1).clamp(min=0)], returns_to_go[index]),
            *(torch.from_numpy(timesteps), torch.from_numpy(valid)),
        )
        window = Window(*(self._on(tensor, self.device) for tensor in gathered))
        for array in self._arrays:
            release(array)
        return window

    @staticmethod
    def _on(tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device.type == "cpu" and device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)


def _fits(tables: list[Tensor], device: torch.device) -> bool:
    """Whether the data takes at most half of the device's free memory."""
    if device.type != "cuda":
        return True
    return 2 * sum(table.nbytes for table in tables) <= torch.cuda.mem_get_info(device)[0]
