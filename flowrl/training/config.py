"""One dataclass is the configuration, the command line and its help.

A preset (``configs/*.yaml``) is turned into command-line arguments that come before the user's own, so that
tyro checks its types and its keys, and flags win over it.
"""

import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from io import StringIO
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, Literal

import tyro
import yaml

from flowrl.attention.kinds import AttentionName
from flowrl.errors import UserError, did_you_mean
from flowrl.model.action_model import LARGEST_DIMENSION
from flowrl.model.agent import Acting, AgentName
from flowrl.model.transformer import TokenLayout

LARGEST_COUNT = 1 << 53  # beyond this, floating point skips whole numbers
PRESET_FOLDER = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class TrainConfig:
    """Train a sequence agent on an offline dataset and evaluate it in its environment."""

    env: str | None = None
    """Name of a D4RL dataset, such as hopper-medium, which also picks the preset of that name in configs/;
    or, beside --dataset PATH, the Gymnasium environment to evaluate in, such as Hopper-v4."""
    dataset: str | None = None
    """Where the data is, if not D4RL's file for --env: minari:mujoco/hopper/medium-v0, or PATH.hdf5 in
    D4RL's layout."""
    config: str | None = None
    """Preset to start from, instead of the one named like --env: a name in configs/ or a YAML file."""
    resume: Path | None = None
    """Run folder to continue from its last checkpoint, exactly; other flags may only change how long, where
    and how often to evaluate, log and save."""
    run_dir: Path | None = None
    """Folder of this run; by default runs/<env>/<attention or bc>-seed<k>-<time>."""

    agent: AgentName = "transformer"
    """transformer: the sequence agent; bc: behaviour cloning, a perceptron of --num-layers hidden layers from
    the observation, without use for --attention, --token-layout, --num-heads and a second of --targets."""
    top_fraction: float = 1.0
    """Train only on the episodes of highest return that make up this share of the timesteps; 0.1 with --agent
    bc is the Decision Transformer paper's 10%-BC."""
    attention: AttentionName = "flow"
    """flow: causal Flow-Attention; softmax: the Decision Transformer's; linear: with elu + 1; performer: with
    positive random features; cosformer: with ReLU, re-weighted by distance."""
    token_layout: TokenLayout = "interleaved"
    """interleaved: return-to-go, observation and action tokens; fused: one token per timestep."""
    context_length: int | Literal["episode"] = 20
    """Timesteps per training window, or 'episode' for whole episodes."""
    num_layers: int = 3
    """Transformer blocks."""
    embed_dim: int = 256
    """Width of the residual stream; a multiple of --num-heads."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.1
    """Dropout on embeddings and on each block's two outputs."""

    steps: int = 100_000
    """Gradient updates."""
    batch_size: int = 64
    """Windows per update."""
    learning_rate: float = 1e-3
    """AdamW's peak learning rate."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay, on all parameters."""
    warmup_steps: int | None = None
    """Updates of linear warm-up; by default a tenth of --steps, at most 10,000."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to a tenth of the peak at --steps, or constant."""
    gradient_clip: float = 0.25
    """Largest norm of the gradient."""
    ema_decay: float = 0.9999
    """Largest decay of the exponential moving average of the weights, which is evaluated and loaded to act.
    It grows with the updates t as (1 + t) / (10 + t): the average reaches back over a ninth of them. 0: the
    last weights are used."""
    return_scale: float | None = None
    """Returns-to-go are divided by this; by default the largest magnitude in the data."""
    reward_mode: Literal["dense", "delayed"] = "dense"
    """delayed: the whole return is given on an episode's last step."""
    seed: int = 0
    """Seed of initial weights, batches, dropout and evaluation episodes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of training's matrix products; weights and sums stay float32. auto: bfloat16 on CUDA, float32 on a CPU
    (one with AMX may train up to twice as fast in bfloat16)."""
    compile: bool = False
    """torch.compile the training loss; off, as updates of the paper's size measured 1.2 times as long with it
    on a CPU."""

    targets: tuple[float, ...] = ()
    """Target returns to evaluate at; by default the best return in the data and half of it."""
    eval_every: int = 10_000
    """Updates between evaluations; the last update is always evaluated, 0 evaluates only then."""
    eval_episodes: int = 20
    """Episodes per target return; 0 trains without any evaluation."""
    acting: Acting | None = None
    """recurrent or window; by default recurrent after training on whole episodes, else window."""
    log_every: int = 100
    """Updates between lines of metrics."""
    checkpoint_every: int = 1_000
    """Updates between checkpoints; the last update is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""

    @property
    def warmup(self) -> int:
        """Updates of warm-up, the default filled in."""
        return min(self.steps // 10, 10_000) if self.warmup_steps is None else self.warmup_steps


# What --resume may change: none of it alters what one update computes, but for the schedule's length.
RESUMABLE = frozenset(
    (
        *("steps", "device", "compile", "resume", "run_dir"),
        *("targets", "eval_every", "eval_episodes", "acting"),
        *("log_every", "checkpoint_every", "keep_checkpoints"),
    )
)


# Where a run's options come from and go to; not what the run is.
_WHERE = frozenset(("config", "resume", "run_dir"))


def parse_train_config(arguments: list[str] | None = None) -> TrainConfig:
    """Parse the command line (``sys.argv`` by default), with the preset or the resumed run underneath.

    Raises:
        UserError: an unusable preset or value. Unknown flags end the program with tyro's message and code 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = tyro.cli(TrainConfig, args=arguments)
    if flags.resume is not None:
        saved = flags.resume / "config.yaml"
        if not saved.is_file():
            raise UserError(f"--resume {flags.resume}: not a run folder, it has no config.yaml")
        base = read_yaml_arguments(saved)
    else:
        preset = find_preset(flags)
        base = [] if preset is None else read_yaml_arguments(preset)
    config = tyro.cli(TrainConfig, args=base + arguments)
    if flags.resume is not None:
        _check_resumable(tyro.cli(TrainConfig, args=base), config, flags.resume)
    check_values(config)
    return config


def find_preset(flags: TrainConfig) -> Path | None:
    """Return the preset file that the flags ask for, None where there is none for ``--env``."""
    if flags.config is None:
        path = PRESET_FOLDER / f"{flags.env}.yaml"
        return path if flags.env and path.is_file() else None
    for path in (Path(flags.config), PRESET_FOLDER / f"{flags.config}.yaml"):
        if path.is_file():
            return path
    names = [path.stem for path in PRESET_FOLDER.glob("*.yaml")]
    raise UserError(f"--config {flags.config}: no such file or preset{did_you_mean(flags.config, names)}")


def read_yaml_arguments(path: Path) -> list[str]:
    """Read a YAML mapping of TrainConfig's fields as command-line arguments.

    Raises:
        UserError: not YAML, a duplicate or unknown key, or a value of the wrong type (all named).
    """
    return options_to_arguments(read_yaml_mapping(path), where=str(path))


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that is one mapping; keys are unique and nothing is repeated by reference.

    Raises:
        UserError: unreadable, not YAML, a duplicate key, or no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping from option names to values")
    return data


def options_to_arguments(options: dict[str, Any], where: str) -> list[str]:
    """Return TrainConfig's fields given by name as command-line arguments; ``where`` begins messages.

    Raises:
        UserError: an unknown name, or a value of the wrong type.
    """
    known = {field.name for field in fields(TrainConfig)} - {"resume"}
    arguments: list[str] = []
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{where}: unknown option {short_repr(key)}{did_you_mean(str(key), known)}")
        if not _is_valid(key, value):
            raise UserError(f"{where}: '{key}' cannot be {short_repr(value)}; see --help for what it takes")
        arguments += _to_arguments(key, value)
    return arguments


def to_arguments(config: TrainConfig) -> list[str]:
    """Return the command-line arguments that say all of the configuration, but for where the run is."""
    options = {name: value for name, value in asdict(config).items() if name not in _WHERE}
    return [argument for name, value in options.items() for argument in _to_arguments(name, value)]


def to_yaml(config: TrainConfig) -> str:
    """Return the configuration as YAML that :func:`read_yaml_arguments` reads back to the same."""
    data = {name: _plain(value) for name, value in asdict(config).items() if name != "resume"}
    return yaml.safe_dump(data, sort_keys=False)


def check_values(config: TrainConfig) -> None:
    """Raise a UserError that names the first flag whose value makes no sense."""
    context = config.context_length
    lowest = {
        "context_length": 1, "num_layers": 1, "embed_dim": 1, "num_heads": 1, "steps": 1, "batch_size": 1,
        "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "eval_every": 0, "eval_episodes": 0,
        "warmup_steps": 0, "weight_decay": 0, "dropout": 0, "ema_decay": 0, "seed": 0,
    }  # fmt: skip
    highest = {
        "context_length": LARGEST_DIMENSION, "embed_dim": LARGEST_DIMENSION, "num_heads": LARGEST_DIMENSION,
        "batch_size": LARGEST_DIMENSION, "num_layers": 1000, "seed": (1 << 32) - 1,
        **dict.fromkeys(("steps", "warmup_steps", "eval_every", "eval_episodes"), LARGEST_COUNT),
        **dict.fromkeys(("log_every", "checkpoint_every", "keep_checkpoints"), LARGEST_COUNT),
    }  # fmt: skip
    for name, bound in lowest.items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not value >= bound:
            raise UserError(f"{_flag(name)} {value}: must be at least {bound}")
    for name, bound in highest.items():
        value = getattr(config, name)
        if isinstance(value, int) and value > bound:
            raise UserError(f"{_flag(name)} {value}: must be at most {bound}")
    for name in ("learning_rate", "gradient_clip", "return_scale"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{_flag(name)} {value}: must be a finite number above 0")
    if not 0 < config.top_fraction <= 1:
        raise UserError(f"--top-fraction {config.top_fraction}: must be above 0 and at most 1")
    for name in ("dropout", "ema_decay"):
        if not getattr(config, name) < 1:
            raise UserError(f"{_flag(name)} {getattr(config, name)}: must be below 1")
    if not config.weight_decay < float("inf"):
        raise UserError(f"--weight-decay {config.weight_decay}: must be finite")
    if config.embed_dim % config.num_heads:
        raise UserError(
            f"--embed-dim {config.embed_dim}: must be a multiple of --num-heads {config.num_heads}"
        )
    if isinstance(context, str) and context != "episode":
        raise UserError(f"--context-length {context}: must be a number of timesteps or 'episode'")
    if not all(abs(target) < float("inf") for target in config.targets):
        raise UserError(f"--targets {' '.join(map(str, config.targets))}: must be finite numbers")
    if config.env is None and config.dataset is None:
        raise UserError("nothing to train on: give --env (such as hopper-medium) or --dataset")


def _check_resumable(saved: TrainConfig, asked: TrainConfig, run: Path) -> None:
    for field in fields(TrainConfig):
        before, now = getattr(saved, field.name), getattr(asked, field.name)
        if before != now and field.name not in RESUMABLE:
            raise UserError(
                f"{_flag(field.name)} {now}: {run} was trained with {before}, --resume cannot change it"
            )


def _is_valid(key: str, value: Any) -> bool:
    """Whether tyro takes the value for this option, and for no other (a string may look like a flag)."""
    values = value if isinstance(value, list) else [value]
    if not all(element is None or isinstance(element, bool | int | float | str) for element in values):
        return False
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            parsed = tyro.cli(TrainConfig, args=_to_arguments(key, value))
    except SystemExit:
        return False
    return replace(parsed, **{key: getattr(TrainConfig, key)}) == TrainConfig()


def _to_arguments(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [_flag(key) if value else _flag(f"no_{key}")]
    if isinstance(value, list | tuple):
        return [_flag(key), *map(str, value)]
    return [_flag(key), str(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but keys are names, each given once, and nothing is repeated by reference.

    PyYAML lets the last of two equal keys win, and a few lines of references can stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                raise yaml.YAMLError("a key must be a name")
            if key_node.value in seen:
                raise yaml.YAMLError(f"key {short_repr(key_node.value)} is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)
