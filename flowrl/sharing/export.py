"""One timestep of a trained agent as a file that runs without flowrl: torch.export's archive, or ONNX.

The exported step takes a batch of any size and carries the whole episode in tensors of constant size::

    actions, next timesteps, next previous_actions, next state ... =
        step(observations, returns_to_go, timesteps, previous_actions, state ...)

Normalisation and action bounds are inside. All zeros is the state before an episode's first timestep; a row
whose timestep is 0 begins a new episode, whatever the rest of its state. The caller subtracts each reward
from the return-to-go, but for agents of delayed rewards and those conditioned on the target itself.
"""

import copy
import json
import logging
import warnings
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from flowrl.atomic import atomic_path
from flowrl.errors import UserError
from flowrl.model.action_model import ActingState
from flowrl.model.agent import Agent
from flowrl.model.checkpoint import CheckpointName
from flowrl.model.loading import load_agent
from flowrl.model.transformer import SequenceModel

SUFFIXES = (".pt2", ".onnx")
TOLERANCE = 1e-4  # of actions, against the agent; of half their range where that is above 1
FORMAT_VERSION = 1  # of the inputs, outputs and metadata: another one where a reader of this one would fail
_CHECKED_TIMESTEPS, _CHECKED_EPISODES = 20, 3


@dataclass(frozen=True)
class ExportConfig:
    """Write the recurrent step of a trained agent as one file for torch or ONNX."""

    run: tyro.conf.Positional[str]
    """Run folder, pretrained:NAME, or hf:OWNER/NAME."""
    out: Path
    """The file to write: .pt2, torch.export's archive, or .onnx for onnxruntime, which needs the 'export'
    extra."""
    checkpoint: CheckpointName | None = None
    """Step of the checkpoint, or best: the one that --keep-best kept; by default the last one."""


class ExportedStep(nn.Module):
    """The step of a model on flat tensors; see the module's docstring."""

    def __init__(self, agent: Agent) -> None:
        """Raises UserError where the state grows with the episode (softmax attention)."""
        super().__init__()
        model = copy.deepcopy(agent.model).cpu().eval().requires_grad_(False)
        model.__dict__.pop("read", None)  # torch's operations, where the agent acted in C++
        self.state_shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(model, SequenceModel) and model.config.attention == "softmax":
            raise UserError("softmax attention cannot be exported: its state grows with the episode")
        self.model = model
        self.pending = isinstance(model, SequenceModel) and model.config.token_layout == "interleaved"
        with torch.inference_mode():
            _, state = self._step(self.inputs(2), model.start(2).layers)
        self.layer_types: list[Any] = [type(layer) for layer in state.layers]
        for index, layer in enumerate(state.layers):
            for name, tensor in layer._asdict().items():
                self.state_shapes[f"layer{index}_{name}"] = tuple(tensor.shape[1:])

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in order; of the outputs but for the first the same with ``next_``."""
        return ["observations", "returns_to_go", "timesteps", "previous_actions", *self.state_shapes]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["actions", *(f"next_{name}" for name in self.input_names[2:])]

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Zeros for every input: of ``batch`` episodes before their first timestep."""
        observations = torch.zeros(batch, len(self.model.observation_mean))
        timesteps = torch.zeros(batch, dtype=torch.int64)
        previous_actions = torch.zeros(batch, len(self.model.action_low))
        state = [torch.zeros(batch, *shape) for shape in self.state_shapes.values()]
        return observations, torch.zeros(batch), timesteps, previous_actions, *state

    def forward(
        self,
        observations: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        previous_actions: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        """(batch, observation_dim), (batch,), (batch,) int64, (batch, action_dim), state -> see above."""
        fields = iter(state)
        layers = tuple(kind(*islice(fields, len(kind._fields))) for kind in self.layer_types)
        inputs = (observations, returns_to_go, timesteps, previous_actions)
        outputs, after = self._step(inputs, layers)
        actions = self.model.to_actions(outputs)
        layers_after = (tensor for layer in after.layers for tensor in layer)
        return actions, timesteps + 1, actions.clone(), *layers_after

    def _step(self, inputs: tuple[Tensor, ...], layers: tuple[Any, ...]) -> tuple[Tensor, ActingState]:
        observations, returns_to_go, timesteps, previous_actions = inputs
        state = ActingState(layers, previous_actions, pending=self.pending)
        # Reads the pending actions, and puts rows back to the start whose timestep is the first.
        state = self.model.restart(state, timesteps == 0, timesteps.clamp(min=1))
        return self.model.step(observations, returns_to_go, timesteps, state)


def export_agent(agent: Agent, path: Path) -> float:
    """Write the recurrent step of ``agent`` to ``path``; return the largest difference of actions found.

    A suffix of .pt2 stands for torch.export's archive, any other for ONNX.
    The written file is run beside the agent over a few timesteps of random observations before it appears
    under its name. Its metadata, JSON under ``flowrl``, holds names and shapes of the state, targets,
    environment and dataset.

    Raises:
        UserError: an attention whose state grows, a missing package, or a file that does not act as the
            agent does.
    """
    step = ExportedStep(agent)
    metadata = json.dumps(_metadata(agent, step), indent=2)
    with atomic_path(path) as temporary:
        write = _write_torch if path.suffix == ".pt2" else _write_onnx
        run = write(step, temporary, metadata)
        difference = _largest_difference(agent, step, run)
        if not difference <= TOLERANCE:
            raise UserError(f"{path}: its actions differ from the agent's by {difference:.1e}; not written")
    return difference


def run_export(config: ExportConfig) -> None:
    """The command: load, export, check, print.

    Raises:
        UserError: an unusable run or file name, and see :func:`export_agent`.
    """
    if config.out.suffix not in SUFFIXES:
        raise UserError(f"--out {config.out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if config.out.is_dir():
        raise UserError(f"--out {config.out}: this is a folder")
    agent = load_agent(config.run, checkpoint=config.checkpoint)
    if agent.acting == "window":
        print(
            "note: this agent acts by windows; the file carries the whole episode, as --acting recurrent does"
        )
    difference = export_agent(agent, config.out)
    size = config.out.stat().st_size / 2**20
    print(
        f"{config.out}: step {agent.checkpoint_step}, {size:.1f} MiB; actions differ from the agent's by at "
        f"most {difference:.1e} over {_CHECKED_TIMESTEPS} timesteps"
    )


def _write_torch(step: ExportedStep, path: Path, metadata: str) -> Any:
    with path.open("wb") as file:
        torch.export.save(_traced(step), file, extra_files={"flowrl.json": metadata})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _traced(step: ExportedStep) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    state = ((batch,) * len(step.state_shapes),) if step.state_shapes else ()  # of forward's *state
    shapes = (batch,) * 4 + state
    return torch.export.export(step, step.inputs(2), dynamic_shapes=shapes, strict=False)


def _write_onnx(step: ExportedStep, path: Path, metadata: str) -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"ONNX needs the package '{error.name}': pip install 'flowrl[export]'") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports packages that nothing here needs
    inputs, outputs = step.input_names, step.output_names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.onnx.export(
            _traced(step), dynamo=True, verbose=False, input_names=inputs, output_names=outputs
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {"flowrl": metadata})
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(step.input_names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(step.output_names, feed)]

    return run


def _largest_difference(agent: Agent, step: ExportedStep, run: Any) -> float:
    """Largest difference of actions between a file's step and the agent, on random observations.

    Continuous actions count in halves of their range where that is above 1.
    """
    reference = Agent(copy.deepcopy(agent.model).cpu(), agent.config, acting="recurrent")
    random, episodes = np.random.default_rng(0), _CHECKED_EPISODES
    mean, std = step.model.observation_mean.numpy(), step.model.observation_std.numpy()
    state: Any = step.inputs(episodes)[2:]
    scale: Any = 1.0
    if not agent.model.action_choices:
        scale = ((step.model.action_high - step.model.action_low) / 2).clamp(min=1).numpy()
    largest = 0.0
    reference.reset(episodes, 0.0)
    for _ in range(_CHECKED_TIMESTEPS):
        observations = (mean + std * random.standard_normal((episodes, len(mean)))).astype(np.float32)
        returns_to_go = (max(agent.config.targets) * random.random(episodes)).astype(np.float32)
        reference.set_target(returns_to_go)  # without rewards, what is left of it stays the same
        expected = reference.act(observations, np.zeros(episodes))
        actions, *state = run(torch.from_numpy(observations), torch.from_numpy(returns_to_go), *state)
        if agent.model.action_choices:
            actions = agent.model.action_indices(actions).squeeze(-1)
        largest = max(largest, float((np.abs(actions.numpy() - expected) / scale).max()))
    return largest


def _metadata(agent: Agent, step: ExportedStep) -> dict[str, Any]:
    config = agent.config
    return {
        "format_version": FORMAT_VERSION,
        "inputs": step.input_names,
        "outputs": step.output_names,
        "observation_dim": config.model.observation_dim,
        "action_dim": config.model.action_dim,
        "action_choices": list(agent.model.action_choices),
        "state_shapes": step.state_shapes,
        "targets": config.targets,
        "reward_mode": config.reward_mode,
        "conditioning": agent.conditioning,
        "dataset_id": config.dataset_id,
        "environment": None if config.environment is None else asdict(config.environment),
    }
