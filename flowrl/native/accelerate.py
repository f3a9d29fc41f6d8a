"""Optional speed on CPUs, put into a model from outside: the model itself is plain torch.

Everything here steps aside with ``FLOWRL_KERNELS=off``, on other devices, for models of another structure,
and where it disagrees with torch (see ``kernels.py``).
"""

from torch import nn

from flowrl.model.action_model import ActionModel
from flowrl.model.transformer import SequenceModel
from flowrl.native.acting import PackedBlocks, can_pack
from flowrl.native.dropout import FastDropout
from flowrl.native.kernels import kernels_enabled
from flowrl.native.linear import OneDNNLinear, library_is_held_back


def accelerate_training(model: ActionModel) -> None:
    """Give a model on a CPU faster dropout, and faster products where MKL keeps to half-width vectors."""
    if model.action_low.device.type != "cpu" or not kernels_enabled():
        return
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
        elif type(module) is nn.Linear and library_is_held_back():
            module.__class__ = OneDNNLinear


def accelerate_acting(model: ActionModel) -> None:
    """Let a Flow-Attention model on a CPU read new tokens in C++, with a copy of its weights as they are now.

    To be called again where the weights have changed.
    """
    model.__dict__.pop("read", None)  # the copy of an earlier call
    if isinstance(model, SequenceModel) and can_pack(model):
        model.read = PackedBlocks(model).read  # type: ignore[method-assign]
