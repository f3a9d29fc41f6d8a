"""Agents to and from the plain data of a checkpoint; ``flowrl.load_agent`` is here."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, TypeVar, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from flowrl.errors import UserError
from flowrl.model.agent import Acting, Agent, AgentConfig, AgentName, Conditioning
from flowrl.model.behavior_cloning import BehaviorCloningConfig, BehaviorCloningModel
from flowrl.model.checkpoint import AGENT_JSON, MODEL_TENSORS, CheckpointName, load_checkpoint
from flowrl.model.hub import agent_folder
from flowrl.model.pretrained import dequantized
from flowrl.model.transformer import ModelConfig, SequenceModel
from flowrl.options import checked

T = TypeVar("T")
MODELS: dict[AgentName, type[ModelConfig] | type[BehaviorCloningConfig]] = {
    "transformer": ModelConfig,
    "bc": BehaviorCloningConfig,
}


def load_agent(
    run: str | Path,
    *,
    checkpoint: CheckpointName | None = None,
    acting: Acting | None = None,
    conditioning: Conditioning | None = None,
    device: str = "cpu",
    source_clamp: float | None = None,
    temperature: float = 0.0,
) -> Agent:
    """Load a trained agent from its run folder; the dataset is not needed.

    Args:
        run: run folder, one checkpoint's folder, one that :meth:`Agent.save` wrote, an agent of the package
            (pretrained:hopper-medium), or one on the Hugging Face Hub: hf:OWNER/NAME, or
            hf:OWNER/NAME@REVISION with a branch, tag or commit.
        checkpoint: step to load, or best: the one that ``--keep-best`` kept; by default the newest whole one.
        acting: recurrent or window; by default the way the agent was trained for.
        conditioning: return-to-go or target, see :class:`AgentConfig`; by default as it was trained for.
        device: where it runs: auto, cpu, cuda, cuda:1, ...
        source_clamp: in place of the model's own, for acting longer than it was trained for.
        temperature: of discrete actions, which are drawn above 0; at 0 the likeliest are taken.

    Raises:
        UserError: an unusable argument, nothing there, damaged files, or tensors that do not fit the
            configuration.
    """
    run = agent_folder(run)
    for name, value, values in (("acting", acting, Acting), ("conditioning", conditioning, Conditioning)):
        if value not in (None, *get_args(values)):
            raise UserError(f"{name} '{value}': expected one of {', '.join(get_args(values))}")
    if not temperature >= 0:
        raise UserError(f"temperature {temperature}: must be at least 0")
    loaded = load_checkpoint(run, checkpoint)
    config = agent_config_from_dict(loaded.agent, where=f"{run}: {AGENT_JSON}")
    if source_clamp is not None:
        if not isinstance(config.model, ModelConfig) or config.model.attention != "flow":
            raise UserError(f"source_clamp {source_clamp}: {run} has no Flow-Attention")
        given = checked(ModelConfig, {"source_clamp": source_clamp}, str)
        config = replace(config, model=replace(config.model, **given))
    model = build_model(config.model, dequantized(loaded.model), where=f"{run}: {MODEL_TENSORS}")
    model.to(pick_device(device))
    return Agent(
        model.eval(),
        config,
        acting=acting,
        conditioning=conditioning,
        temperature=temperature,
        checkpoint_step=loaded.step,
    )


def untrained_model(config: ModelConfig | BehaviorCloningConfig) -> SequenceModel | BehaviorCloningModel:
    """Make a model of this shape, with random weights."""
    return SequenceModel(config) if isinstance(config, ModelConfig) else BehaviorCloningModel(config)


def build_model(
    config: ModelConfig | BehaviorCloningConfig, tensors: dict[str, Tensor], where: str
) -> SequenceModel | BehaviorCloningModel:
    """Make a model of these tensors; a missing, extra or misshapen one is a UserError that names it."""
    with torch.device("meta"):  # shapes are checked before memory is allocated
        model = untrained_model(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"{where}: tensor '{name}' is missing")
        if name not in expected:
            raise UserError(f"{where}: unknown tensor '{name}'")
        if tensors[name].shape != expected[name].shape or tensors[name].dtype != expected[name].dtype:
            raise UserError(
                f"{where}: tensor '{name}' is {tensors[name].dtype} {tuple(tensors[name].shape)}, "
                f"expected {expected[name].dtype} {tuple(expected[name].shape)}"
            )
        if not tensors[name].isfinite().all():
            raise UserError(f"{where}: tensor '{name}' holds NaN or infinity")
    # Copies: tensors of a file begin at odd addresses, and MKL sums in another order there.
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(True)


def agent_config_from_dict(data: dict[str, Any], where: str) -> AgentConfig:
    """The inverse of :meth:`AgentConfig.to_dict`; a missing, unknown or unsuitable entry is a UserError.

    Entries that older files lack have defaults, which are what they were then.
    """
    data = dict(data)
    agent = data.pop("agent", "transformer")  # absent in files from before there was a choice
    if agent not in get_args(AgentName):
        raise UserError(f"{where}: 'agent' is {agent!r}, expected one of {', '.join(get_args(AgentName))}")
    model = _validated(MODELS[agent], data.get("model"), f"{where}: model")
    config = _validated(AgentConfig, {**data, "model": asdict(model)}, where)
    if config.context_length > model.max_timesteps:  # no window is longer than the longest episode
        raise UserError(f"{where}: 'context_length' {config.context_length} is beyond 'max_timesteps'")
    return replace(config, model=model)


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """Turn a --device value into a device; ``auto`` takes a GPU when there is one.

    A GPU without a number is that of ``local_rank``, this process' number among those on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N") from error
    if picked.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return picked


def _validated(kind: type[T], data: Any, where: str) -> T:
    """A dataclass of pydantic's from JSON types."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "entries"
        raise UserError(f"{where}: '{name}': {first['msg']}, found {short_repr(first['input'])}") from error
