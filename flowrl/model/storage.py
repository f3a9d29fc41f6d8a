"""Agents to and from the plain data of a checkpoint; ``flowrl.load_agent`` is here."""

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flowrl.attention.cosformer import MAX_TOKENS
from flowrl.attention.kinds import ATTENTION_KINDS
from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.model.agent import Acting, Agent, AgentConfig
from flowrl.model.behavior_cloning import BehaviorCloningConfig, BehaviorCloningModel
from flowrl.model.checkpoint import AGENT_JSON, MODEL_TENSORS, load_checkpoint
from flowrl.model.transformer import ModelConfig, SequenceModel, TokenLayout

LARGEST_DIMENSION = 1 << 20  # a stored size beyond this is damage or malice, not a model
LARGEST_NUM_LAYERS = 1000
AgentName = Literal["transformer", "bc"]
_SIZES = (
    "observation_dim",
    "action_dim",
    "max_timesteps",
    "num_layers",
    "embed_dim",
    "num_heads",
    "context_tokens",
)


def load_agent(
    run: str | Path, *, checkpoint: int | None = None, acting: Acting | None = None, device: str = "cpu"
) -> Agent:
    """Load a trained agent from its run folder; the dataset is not needed.

    Args:
        run: run folder, or one checkpoint's folder.
        checkpoint: step to load; the newest whole one by default.
        acting: recurrent or window; by default the way the agent was trained for.
        device: where it runs: auto, cpu, cuda, cuda:1, ...

    Raises:
        UserError: nothing there, damaged files, or tensors that do not fit the configuration.
    """
    run = Path(run)
    if acting not in (None, *get_args(Acting)):
        raise UserError(f"acting '{acting}': expected one of {', '.join(get_args(Acting))}")
    loaded = load_checkpoint(run, checkpoint)
    config = agent_config_from_dict(loaded.agent, where=f"{run}: {AGENT_JSON}")
    model = build_model(config.model, loaded.model, where=f"{run}: {MODEL_TENSORS}")
    model.to(pick_device(device))
    return Agent(model.eval(), config, acting=acting, checkpoint_step=loaded.step)


def untrained_model(config: ModelConfig | BehaviorCloningConfig) -> SequenceModel | BehaviorCloningModel:
    """Make a model of this shape, with random weights."""
    return SequenceModel(config) if isinstance(config, ModelConfig) else BehaviorCloningModel(config)


def build_model(
    config: ModelConfig | BehaviorCloningConfig, tensors: dict[str, Tensor], where: str
) -> SequenceModel | BehaviorCloningModel:
    """Make a model of these tensors; a missing, extra or misshapen one is a UserError that names it."""
    with torch.device("meta"):  # shapes first: no memory is taken on the word of a file
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
    # Copies: where in memory a file's tensors begin is its own business, and decides how MKL sums.
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def agent_config_to_dict(config: AgentConfig) -> dict[str, Any]:
    """Return plain JSON types, the inverse of :func:`agent_config_from_dict`."""
    agent: AgentName = "bc" if isinstance(config.model, BehaviorCloningConfig) else "transformer"
    data = {"agent": agent, **asdict(config)}
    data["targets"] = list(config.targets)
    data["environment"] = config.environment and config.environment.to_dict()
    return data


def agent_config_from_dict(data: dict[str, Any], where: str) -> AgentConfig:
    """Check and build; a missing, unknown or unsuitable entry is a UserError that names it."""
    agent = data.get("agent", "transformer")  # files from before there was a choice do not say
    data = {name: value for name, value in data.items() if name != "agent"}
    _check_choice(where, "agent", agent, get_args(AgentName))
    _check_keys(data, AgentConfig, where)
    model = _model_config(data["model"], agent, where)
    _check_sizes(where, {"context_length": data["context_length"]})
    if data["context_length"] > model.max_timesteps:  # no window is longer than the longest episode
        raise UserError(f"{where}: 'context_length' {data['context_length']} is beyond 'max_timesteps'")
    _check_choice(where, "reward_mode", data["reward_mode"], ("dense", "delayed"))
    if not isinstance(data["full_episodes"], bool):
        raise UserError(f"{where}: 'full_episodes' must be true or false")
    for name in ("dataset_id", "dataset_sha256"):
        if not isinstance(data[name], str):
            raise UserError(f"{where}: '{name}' must be a string")
    targets = data["targets"]
    if not isinstance(targets, list) or not all(map(_is_finite_number, targets)):
        raise UserError(f"{where}: 'targets' must be a list of finite numbers")
    reference = data["reference"]
    if reference is not None:
        bounds = reference if isinstance(reference, dict) else {}
        if bounds.keys() != {"minimum", "maximum"} or not all(map(_is_finite_number, bounds.values())):
            raise UserError(f"{where}: 'reference' must hold the finite numbers 'minimum' and 'maximum'")
    try:
        environment = None if data["environment"] is None else EnvironmentSpec.from_dict(data["environment"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return AgentConfig(
        **{
            **data,
            "model": model,
            "targets": tuple(float(target) for target in targets),
            "environment": environment,
            "reference": reference and ReferenceScores(**reference),
        }
    )


def _model_config(model: Any, agent: AgentName, where: str) -> ModelConfig | BehaviorCloningConfig:
    kind = BehaviorCloningConfig if agent == "bc" else ModelConfig
    if not isinstance(model, dict):
        raise UserError(f"{where}: 'model' must be an object")
    if agent == "transformer":
        model = {"context_tokens": MAX_TOKENS, **model}  # agents saved before this entry had that constant
    _check_keys(model, kind, where)
    _check_sizes(where, {name: model[name] for name in _SIZES if name in model})
    if model["num_layers"] > LARGEST_NUM_LAYERS or model["embed_dim"] % model.get("num_heads", 1):
        raise UserError(
            f"{where}: 'num_layers' is beyond {LARGEST_NUM_LAYERS} or 'embed_dim' no multiple of 'num_heads'"
        )
    if agent == "transformer":
        _check_choice(where, "attention", model["attention"], tuple(ATTENTION_KINDS))
        _check_choice(where, "token_layout", model["token_layout"], get_args(TokenLayout))
    if not isinstance(model["dropout"], int | float) or not 0 <= model["dropout"] < 1:
        raise UserError(f"{where}: 'dropout' is {model['dropout']!r}, expected a number from 0 to below 1")
    return kind(**model)


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


def _check_keys(data: dict[str, Any], kind: type, where: str) -> None:
    names = {field.name for field in fields(kind)}
    for name in sorted(names ^ data.keys()):
        raise UserError(f"{where}: {'missing' if name in names else 'unknown'} entry '{name}'")


def _check_sizes(where: str, sizes: dict[str, Any]) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_DIMENSION:
            raise UserError(f"{where}: '{name}' is {value!r}, expected a whole number from 1")


def _check_choice(where: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{where}: '{name}' is {value!r}, expected one of {', '.join(choices)}")


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
