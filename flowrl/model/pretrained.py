"""Agents of the package, ``pretrained:NAME``: folders as :meth:`Agent.save` makes, matrices in 8 bits."""

from pathlib import Path

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.model.checkpoint import MANIFEST

PREFIX = "pretrained:"
PRETRAINED_DIR = Path(__file__).parents[1] / "assets" / "pretrained"
ROW_SCALE = ".row_scale"


def pretrained_names() -> list[str]:
    """Return the names of the agents in the package, sorted."""
    return sorted(manifest.parent.name for manifest in PRETRAINED_DIR.glob(f"*/{MANIFEST}"))


def pretrained_folder(name: str) -> Path:
    """Return the folder of the agent ``pretrained:<name>``; a UserError lists the names if there is none."""
    known = pretrained_names()
    if name not in known:
        raise UserError(f"{PREFIX}{name}: no such agent in the package; known: {', '.join(known)}")
    return PRETRAINED_DIR / name


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices from 8-bit integers and scales of their rows; what does not fit together stays as it is."""
    restored = dict(tensors)
    for name, integers in tensors.items():
        scale = tensors.get(name + ROW_SCALE)
        if integers.dtype == torch.int8 and scale is not None and scale.shape == (len(integers), 1):
            restored[name] = integers.float() * restored.pop(name + ROW_SCALE)
    return restored
