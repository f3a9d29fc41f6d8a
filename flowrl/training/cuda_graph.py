"""A training step recorded as CUDA graphs and replayed: one launch instead of several hundred.

Source: PyTorch's notes on CUDA graphs, "Whole-network capture". The random numbers of dropout come from the
device's default generator, which torch registers with the graph: a replay draws, and advances the generator
by, what the same step run eagerly would. Steps of either kind may therefore follow each other.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from flowrl.window import Window

WARM_UPS = 3  # eager steps of each length on the graph's stream first: kernels get chosen and compiled


class CapturedStep:
    """Calls ``step(window)``, recorded as one CUDA graph for each length of windows.

    ``step`` takes a window on a CUDA device and returns a tensor; everything it changes must stay where it is
    in memory.
    """

    def __init__(self, step: Callable[[Window], Tensor]) -> None:
        self._step = step
        self._calls: Counter[int] = Counter()  # by length
        # By length: the graph, where it reads, where it writes.
        self._recordings: dict[int, tuple[torch.cuda.CUDAGraph, Window, Tensor]] = {}
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # one memory for all lengths: no two replay at a time

    def __call__(self, window: Window) -> Tensor:
        """Return a tensor of the caller's own; nothing here waits for the device but the capture."""
        length = window.timesteps.shape[1]
        self._calls[length] += 1
        if self._calls[length] <= WARM_UPS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._step(window)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if length not in self._recordings:  # nothing is computed while it is recorded
            graph, inputs = torch.cuda.CUDAGraph(), Window(*(tensor.clone() for tensor in window))
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._recordings[length] = (graph, inputs, self._step(inputs))
        graph, inputs, result = self._recordings[length]
        for place, tensor in zip(inputs, window, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result.clone()
