"""One dataclass is the configuration, the command line and its help.

A preset or a resumed run lies under the flags. Bounds are in the types of the fields (:mod:`flowrl.options`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import BeforeValidator, Strict

from flowrl.attention.kinds import SOURCE_CLAMP
from flowrl.envs.options import EvaluationOptions
from flowrl.errors import UserError
from flowrl.model.agent import Acting, AgentName, Conditioning
from flowrl.model.transformer import MixerName, TimeEncoding, TokenLayout
from flowrl.options import (
    MOST_EPISODES,
    ConvolutionWidth,
    Count,
    Episodes,
    NotNegative,
    NumLayers,
    Positive,
    PositiveCount,
    Probability,
    Seed,
    Share,
    Size,
    SourceClamp,
    Target,
    checked,
    flag,
)
from flowrl.plain_yaml import read_yaml_mapping
from flowrl.training.presets import preset_options

FilePath = Annotated[Path, Strict(False)]  # a string will do
FINETUNE_FILE = "finetune.yaml"  # in the folder of a run that was fine-tuned, beside config.yaml


def several(value: object) -> object:
    """A tuple of what may be given as one name, several, or none."""
    return () if value is None else (str(value),) if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class TrainConfig(EvaluationOptions):
    """Train a sequence agent on an offline dataset and evaluate it in its environment."""

    env: str | None = None
    """Name of a D4RL dataset, such as hopper-medium, which also picks the preset of that name, or of a memory
    task, such as tmaze-500; or, beside --dataset PATH, the Gymnasium environment to evaluate in."""
    dataset: Annotated[tuple[str, ...], BeforeValidator(several)] = ()
    """Where the data is, if not D4RL's file for --env: flowrl for its own data of that name,
    minari:mujoco/hopper/medium-v0, or PATH.hdf5 in D4RL's layout; several are trained on together."""
    split_at_timeouts: bool = False
    """Episodes of D4RL files end at timeouts alone: for AntMaze, whose terminal flag stays set at a goal."""
    memory_map: FilePath | None = None
    """Folder for copies of files and Minari datasets that are read from disk as needed: for data larger than
    memory."""
    config: str | None = None
    """Preset to start from: DATASET-RECIPE, such as hopper-medium-long; RECIPE alone, such as long, for the
    dataset of --env; or a YAML file of these options."""
    resume: FilePath | None = None
    """Run folder to continue from its last checkpoint, exactly; other flags may only change how long, where
    and how often to evaluate, log and save, and where the data is now."""
    run_dir: FilePath | None = None
    """Folder of this run; by default runs/<--env, or else --dataset>/<method>-seed<k>-<time>."""

    agent: AgentName = "transformer"
    """transformer: the sequence agent; bc: behaviour cloning, a perceptron of --num-layers hidden layers from
    the observation, which ignores --attention, --token-layout, --num-heads and all --targets but one."""
    top_fraction: Share = 1.0
    """Train only on the episodes of highest return that make up this share of the timesteps; 0.1 with --agent
    bc is the Decision Transformer paper's 10%-BC."""
    validation_fraction: Probability = 0.0
    """Share of the episodes that is held out, the same ones for every --seed; the loss on them is logged when
    evaluations are due."""
    attention: MixerName = "flow"
    """flow: causal Flow-Attention; softmax: the Decision Transformer's; linear: with elu + 1; performer: with
    positive random features; cosformer: with ReLU, re-weighted by distance; gru: torch's GRU in its place."""
    token_layout: TokenLayout = "interleaved"
    """interleaved: return-to-go, observation and action tokens; fused: one token per timestep."""
    source_clamp: SourceClamp = SOURCE_CLAMP
    """Flow-Attention's bound on the conserved source before its exponential. A timestep can stand out from
    about e to this power of later ones: 10 carries a cue over 20,000 timesteps or more, 20 over a million."""
    time_encoding: TimeEncoding = "learned"
    """learned: a row for each timestep of the longest episode or the time limit, the last one for all later;
    sinusoidal: waves, defined for any timestep; none: timesteps are not encoded."""
    context_length: Size | Literal["episode"] = 20
    """Timesteps per training window, or 'episode' for whole episodes."""
    convolution_width: ConvolutionWidth = 0
    """Tokens that a causal convolution before the blocks spans; 0: there is none."""
    num_layers: NumLayers = 3
    """Transformer blocks."""
    embed_dim: Size = 256
    """Width of the residual stream; a multiple of --num-heads."""
    num_heads: Size = 4
    """Attention heads."""
    dropout: Probability = 0.1
    """Dropout on embeddings and on each block's two outputs."""

    steps: PositiveCount = 100_000
    """Gradient updates."""
    batch_size: Size | None = None
    """Windows per update; by default by --timesteps-per-update, or 64."""
    timesteps_per_update: PositiveCount | None = None
    """Without --batch-size, as many windows per update as hold about this many timesteps, at least one."""
    learning_rate: Positive = 1e-3
    """AdamW's peak learning rate."""
    weight_decay: NotNegative = 1e-4
    """AdamW's decoupled weight decay, on all parameters."""
    warmup_steps: Count | None = None
    """Updates of linear warm-up; by default a tenth of --steps, at most 10,000."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to a tenth of the peak at --steps, or constant."""
    gradient_clip: Positive = 0.25
    """Largest norm of the gradient."""
    ema_decay: Probability = 0.9999
    """Largest decay of the exponential moving average of the weights, which is evaluated and loaded to act.
    It grows with the updates t as (1 + t) / (10 + t): the average reaches back over a ninth of them. 0: the
    last weights are used."""
    q_weight: NotNegative = 0.0
    """Value guidance: critics are learned from the data first, and the policy's actions move towards more
    return by about this much, on a scale from -1 to 1, less where critics disagree. 0: off."""
    return_scale: Positive | None = None
    """Returns-to-go are divided by this; by default the largest magnitude in the data."""
    reward_mode: Literal["dense", "delayed"] = "dense"
    """delayed: the whole return is given on an episode's last timestep."""
    mask_velocities: bool = False
    """Hide the velocities in a robot's observations from the agent, in training and wherever it acts."""
    seed: Seed = 0
    """Seed of initial weights, batches, dropout and evaluation episodes, each drawn apart."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of training's matrix products; weights and sums stay float32. auto: bfloat16 on GPUs that compute in
    it, float32 elsewhere (a CPU with AMX may train up to twice as fast in bfloat16)."""
    compile: bool = False
    """torch.compile the training loss; off, as it was slower on a CPU."""

    targets: tuple[Target, ...] = ()
    """Target returns to evaluate at; by default the best and the median episode's return in the data."""
    eval_every: Count = 10_000
    """Updates between evaluations; the last update is always evaluated, 0 evaluates only then."""
    eval_episodes: Episodes = 20
    """Episodes per target return; 0 trains without any evaluation."""
    eval_seed: Seed | None = None
    """Seed of evaluation episodes; by default one drawn from --seed, so that trainings with different seeds
    share no episode."""
    acting: Acting | None = None
    """recurrent or window; by default recurrent after training on whole episodes, else window."""
    conditioning: Conditioning = "return-to-go"
    """What actions are conditioned on while acting. return-to-go: the target less what was earned, as in the
    Decision Transformer; target: the target itself at every timestep."""
    log_every: PositiveCount = 100
    """Updates between lines of metrics."""
    checkpoint_every: PositiveCount = 1_000
    """Updates between checkpoints; the last update is always saved."""
    keep_checkpoints: PositiveCount = 2
    """Newest checkpoints to keep."""
    keep_best: Literal["normalized_score_mean", "return_mean", "success_rate"] | None = None
    """Also keep the checkpoint whose evaluation during training had the highest of these at the first target;
    it is labelled as chosen by that evaluation, whose score is therefore optimistic."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset", several(self.dataset))  # one name will do

    @property
    def warmup(self) -> int:
        """Updates of warm-up, the default filled in."""
        return min(self.steps // 10, 10_000) if self.warmup_steps is None else self.warmup_steps


# What --resume may change: none of it alters what one update computes, but for the schedule's length. The
# content of a dataset is compared with what the run was trained on, wherever it is now.
RESUMABLE = frozenset(
    (
        *("steps", "device", "compile", "resume", "run_dir", "dataset", "memory_map"),
        *("targets", "eval_every", "eval_episodes", "eval_seed", "acting", "conditioning"),
        *("log_every", "checkpoint_every", "keep_checkpoints", "keep_best"),
    )
)

# Defaults that the first start replaces by what they stand for then, so that --resume does not change it.
RESOLVED_AT_START = {"warmup_steps": None, "precision": "auto", "batch_size": None}

# Where a run's options come from and go to; not what the run is.
_WHERE = frozenset(("config", "resume", "run_dir"))


def parse_train_config(
    arguments: Sequence[str] | None = None, options: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Parse the command line (``sys.argv`` by default), with the preset or the resumed run underneath.

    ``options`` are fields of TrainConfig that lie over the preset and under the command line.

    Raises:
        UserError: an unusable preset or value. Unknown flags end the program with tyro's message and code 2.
    """
    options = options or {}
    flags = tyro.cli(TrainConfig, args=arguments, default=TrainConfig(**options))
    refuse_run_dir(flags.resume, flags.run_dir)
    if flags.resume is None:
        below = _preset(flags)
        if flags.timesteps_per_update is not None:
            below["batch_size"] = None  # the preset's gives way
        if flags.timesteps_per_update != options.get("timesteps_per_update"):  # of the command line
            options = {**options, "batch_size": None}
    else:
        saved = flags.resume / "config.yaml"
        if not saved.is_file():
            raise UserError(f"--resume {flags.resume}: not a run folder, it has no config.yaml")
        if (flags.resume / FINETUNE_FILE).exists():
            raise UserError(
                f"--resume {flags.resume}: was fine-tuned; continue it with flowrl finetune --resume"
            )
        below = read_options(saved)
        below["warmup_steps"] = TrainConfig(**below).warmup
    config = tyro.cli(TrainConfig, args=arguments, default=TrainConfig(**{**below, **options}))
    if flags.resume is not None:
        defaults = {name for name, value in RESOLVED_AT_START.items() if getattr(config, name) == value}
        config = replace(config, **{name: below[name] for name in defaults & below.keys()})
        check_resumable(TrainConfig(**below), config, flags.resume)
    check_values(config)
    return config


def refuse_run_dir(resume: Path | None, run_dir: Path | None) -> None:
    """Raise a UserError where both are given: a resumed run stays in its folder."""
    if resume is not None and run_dir is not None:
        raise UserError(f"--run-dir {run_dir}: --resume continues in {resume}; copy that folder first")


def _preset(flags: TrainConfig) -> dict[str, Any]:
    """The options that ``--config`` names, or the dataset of ``--env``; none where neither names a preset."""
    if flags.config is not None and Path(flags.config).is_file():
        return read_options(Path(flags.config))
    return checked_options(preset_options(flags.config, flags.env), where="preset")


def read_options(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of TrainConfig's fields.

    Raises:
        UserError: not YAML, a duplicate or unknown key, or a value that its option does not take (all named).
    """
    options = read_yaml_mapping(path)
    if options.get("config") and not options.get("run_dir"):  # a run's file holds what its preset stood for
        raise UserError(f"{path}: 'config': a preset cannot be named in a file of options")
    return checked_options(options, where=str(path))


def checked_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return TrainConfig's fields given by name once each is checked; ``where`` begins messages.

    Raises:
        UserError: an unknown name, or a value that its option does not take.
    """
    if "resume" in options:
        raise UserError(f"{where}: 'resume': this is for the command line alone")
    return checked(TrainConfig, options, lambda name: f"{where}: '{name}'")


def check_values(config: TrainConfig) -> None:
    """Raise a UserError that names the first flag whose value makes no sense."""
    checked(TrainConfig, asdict(config), flag)
    if config.agent == "transformer" and config.embed_dim % config.num_heads:
        raise UserError(
            f"--embed-dim {config.embed_dim}: must be a multiple of --num-heads {config.num_heads}"
        )
    targets = 1 if config.agent == "bc" else len(set(config.targets)) or 2  # by default two, at most
    if config.eval_episodes * targets > MOST_EPISODES:
        raise UserError(
            f"--eval-episodes {config.eval_episodes}: must be at most {MOST_EPISODES // targets} at each of "
            f"{targets} --targets"
        )
    if config.keep_best is not None and config.eval_episodes == 0:
        raise UserError(f"--keep-best {config.keep_best}: there are no evaluations with --eval-episodes 0")
    if config.env is None and not config.dataset:
        raise UserError("nothing to train on: give --env (such as hopper-medium) or --dataset")


def to_arguments(config: TrainConfig) -> list[str]:
    """Return the command-line arguments that give the whole configuration, but for where the run is."""
    arguments: list[str] = []
    for name, value in asdict(config).items():
        if name in _WHERE:
            continue
        if isinstance(value, bool):
            arguments.append(flag(name if value else f"no_{name}"))
        elif isinstance(value, tuple):
            arguments += [flag(name), *map(str, value)]
        else:
            arguments.append(f"{flag(name)}={value}")
    return arguments


def to_yaml(config: EvaluationOptions) -> str:
    """Return options as YAML; those of training are read back to the same by :func:`read_options`."""
    data = {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in asdict(config).items()
        if name != "resume"
    }
    return yaml.safe_dump(data, sort_keys=False)


def method_name(options: Mapping[str, Any]) -> str:
    """A method's name by its options: ``flow-interleaved-20``; ``bc-top0.1``, of the best episodes alone."""
    if options["agent"] == "transformer":
        name = "{attention}-{token_layout}-{context_length}".format(**options)
    else:
        name = options["agent"]
    return name if options["top_fraction"] == 1 else f"{name}-top{options['top_fraction']:g}"


def dataset_folder(source: str) -> str:
    """A folder's name for a dataset: the parts of its id or path, joined."""
    path = Path(source.removeprefix("minari:").removesuffix(".hdf5").removesuffix(".h5"))
    return "-".join(part for part in path.parts if part not in ("/", "..", "."))


def check_resumable(saved: EvaluationOptions, asked: EvaluationOptions, run: Path) -> None:
    """Raise a UserError that names the first flag which differs from what a run has, and may not."""
    for field in fields(saved):
        before, now = getattr(saved, field.name), getattr(asked, field.name)
        if before != now and field.name not in RESUMABLE:
            raise UserError(
                f"{flag(field.name)} {now}: {run} was trained with {before}, --resume cannot change it"
            )
