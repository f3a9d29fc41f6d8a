"""A training step recorded once as a CUDA graph and replayed: one launch instead of several hundred.

Source: PyTorch's notes on CUDA graphs, "Whole-network capture". The random numbers of dropout come from the
device's default generator, which torch registers with the graph: a replay draws, and advances the generator
by, what the same step run eagerly would. Steps of either kind may therefore follow each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3  # eager steps on the graph's stream first: libraries make their handles, kernels get compiled


class CapturedStep:
    """Calls ``step(*inputs)``, as a CUDA graph where the inputs have the usual shapes.

    ``step`` takes tensors of a CUDA device and returns one; everything it changes must stay where it is in
    memory. Inputs whose first has another length than ``usual_length`` (dimension 1) are run eagerly.
    """

    def __init__(self, step: Callable[..., Tensor], usual_length: int) -> None:
        self._step = step
        self._usual_length = usual_length
        self._warm_ups = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream()
        self._inputs: list[Tensor] = []  # where the graph reads
        self._result: Tensor  # where it writes

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return a tensor of the caller's own; nothing here waits for the device but the capture."""
        if inputs[0].shape[1] != self._usual_length:
            return self._step(*inputs)
        if self._warm_ups < WARM_UPS:
            self._warm_ups += 1
            return self._on_stream(inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):  # records, computes nothing
                self._result = self._step(*self._inputs)
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._result.clone()

    def _on_stream(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result
