"""One training in several processes, as ``torchrun`` starts them: what they exchange.

Ranks draw the same batches and keep the windows with their own remainder, so that any number of them computes
the update that one process computes. Rank 0 alone writes files and prints.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl.errors import UserError

T = TypeVar("T")

# An evaluation or a save of one rank may take this long before the others give up waiting.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """The processes of a training and which of them this is; without ``torchrun`` there is only one."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def mine(self) -> slice:
        """Which items of a sequence, the same on all ranks, are this rank's."""
        return slice(self.rank, None, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over ranks, in place; every rank returns the same."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: the same answer everywhere."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors (their shapes may differ) of all ranks in order, on the CPU."""
        if self.size == 1:
            return [tensor]
        received: list = [None] * self.size
        dist.all_gather_object(received, tensor)
        return received


ALONE = Ranks()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group that ``torchrun`` describes in the environment, if it does.

    Raises:
        UserError: half a description, or the other processes cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    # Small messages stay on the CPU; gradients of GPUs go through NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the processes of this training cannot find one another: {reason}") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
        dist.barrier()  # barrier, so that no rank tears the group down early
    finally:
        dist.destroy_process_group()
