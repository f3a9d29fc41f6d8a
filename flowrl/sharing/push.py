"""A trained agent on the Hugging Face Hub, with a model card written from its run; and back."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError, one_line
from flowrl.model.agent import Agent, AgentConfig
from flowrl.model.behavior_cloning import BehaviorCloningConfig
from flowrl.model.checkpoint import AGENT_FILES, CheckpointName
from flowrl.model.hub import PREFIX
from flowrl.model.loading import load_agent
from flowrl.report.table import markdown_table
from flowrl.training.metrics import METRICS_FILE, read_metrics

CARD = "README.md"
CURVE = "learning-curve.png"


@dataclass(frozen=True)
class PushConfig:
    """Put a trained agent on the Hugging Face Hub: its averaged weights and a model card."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    repo: tyro.conf.Positional[str]
    """OWNER/NAME; the repository is made if there is none."""
    checkpoint: CheckpointName | None = None
    """Step of the checkpoint, or best: the one that --keep-best kept; by default the last one."""
    video: Path | None = None
    """An .mp4 of the agent, shown on the card."""
    license: str = "mit"
    """Licence of the weights, as an identifier of the Hub."""
    private: bool = False
    """A new repository is private."""
    dry_run: Path | None = None
    """Write what would be sent to this new folder, and send nothing."""


@dataclass(frozen=True)
class PullConfig:
    """Download an agent from the Hugging Face Hub to a folder of its own."""

    repo: tyro.conf.Positional[str]
    """OWNER/NAME, or OWNER/NAME@REVISION with a branch, tag or commit."""
    folder: tyro.conf.Positional[Path]
    """A new folder."""


def push(config: PushConfig) -> None:
    """Write the agent and its card, and send them.

    Raises:
        UserError: an unusable run, a folder that is there already, or a Hub that cannot be reached or
            refuses (a missing token, a name that is not one's own).
    """
    if not re.fullmatch("[^/]+/[^/]+", config.repo):
        raise UserError(f"{config.repo}: expected OWNER/NAME")
    agent = load_agent(config.run, checkpoint=config.checkpoint)
    refuse_paths(agent.config.environment)
    if config.video is not None and not (config.video.is_file() and config.video.suffix == ".mp4"):
        raise UserError(f"--video {config.video}: expected an .mp4 file")
    evaluations = _evaluations(config.run, agent.checkpoint_step)
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.dry_run or Path(temporary) / "agent"
        agent.save(folder)
        if config.video is not None:
            shutil.copyfile(config.video, folder / "video.mp4")
        curve = _draw_curve(evaluations, folder / CURVE)
        (folder / CARD).write_text(_card(agent, config, evaluations, curve), encoding="utf-8")
        if config.dry_run is not None:
            print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}; nothing was sent")
        else:
            link = send_folder(folder, config.repo, "model", "Upload an agent of flowrl", config.private)
            print(f"sent to {link}")


def pull(config: PullConfig) -> None:
    """Download an agent; the folder is whole or absent.

    Raises:
        UserError: see :func:`flowrl.model.hub.agent_folder`; the folder is there already; damaged files.
    """
    name = f"{PREFIX}{config.repo.removeprefix(PREFIX)}"
    load_agent(name).save(config.folder)
    print(f"{config.folder}: {', '.join(sorted(AGENT_FILES))}; load it with flowrl.load_agent")


def send_folder(
    folder: Path, repo: str, kind: Literal["model", "dataset"], message: str, private: bool = False
) -> str:
    """Upload a folder as one commit to OWNER/NAME on the Hub, made if there is none; return its address.

    Raises:
        UserError: the Hub cannot be reached or refuses.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    with hub_errors(repo):
        hub.create_repo(repo, private=private, exist_ok=True, repo_type=kind)
        return hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, repo_type=kind
        ).commit_url


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub answers, and whatever happens without a network, into one UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: not a name that the Hub takes: {one_line(error)}") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("no token of the Hugging Face Hub: `hf auth login`, or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        unauthorized = error.response is not None and error.response.status_code in (401, 403)
        hint = "; check the token: `hf auth login`, or HF_TOKEN" if unauthorized else ""
        raise UserError(f"{repo}: the Hub refused: {one_line(error)}{hint}") from error
    except Exception as error:  # whatever its HTTP library raises without a network, or offline mode
        raise UserError(f"{repo}: the Hub cannot be reached: {one_line(error)}") from error


def refuse_paths(environment: EnvironmentSpec | None) -> None:
    """Raise UserError for a folder of this machine: it is of no use to others, and names its user."""
    for name, value in environment.kwargs.items() if environment else ():
        path = next((text for text in _strings(value) if text.startswith(("/", "~", "./", "../"))), None)
        if path is not None:
            raise UserError(f"the environment's option '{name}' has a path of this machine, {path}")


def _strings(value: object) -> Iterator[str]:
    """All strings within plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _evaluations(run: Path, step: int | None) -> list[dict[str, Any]]:
    """The lines of the run's evaluations up to this step; none beside a lone checkpoint."""
    if not (run / METRICS_FILE).is_file():
        return []
    lines = read_metrics(run, "evaluation", ("target_return", "return_mean", "episodes"))
    return [line for line in lines if line["step"] <= (step or 0)]


def _draw_curve(evaluations: list[dict[str, Any]], path: Path) -> bool:
    """Draw the score at the first target over updates, if matplotlib is there and there is a curve."""
    quantity = "normalized_score" if all("normalized_score_mean" in x for x in evaluations) else "return"
    if not evaluations:
        return False
    last = next(line for line in evaluations if line["step"] == evaluations[-1]["step"])
    first = [line for line in evaluations if line["target_return"] == last["target_return"]]
    if len(first) < 2:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [line["step"] for line in first],
        [line[f"{quantity}_mean"] for line in first],
        [line.get(f"{quantity}_standard_error", 0.0) for line in first],
        marker="o",
        capsize=3,
    )
    axes.set(xlabel="updates", ylabel=f"{quantity.replace('_', ' ')}, mean and standard error over episodes")
    figure.savefig(path, dpi=110)
    return True


def card_header(header: dict[str, Any]) -> str:
    """The YAML that a card begins with, as the Hub reads it."""
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _card(agent: Agent, config: PushConfig, evaluations: list[dict[str, Any]], curve: bool) -> str:
    """The model card: Markdown after the Hub's YAML header."""
    about = agent.config
    dataset = about.dataset_id
    environment = f"`{about.environment.env_id}`" if about.environment else "an unnamed environment"
    limit = about.environment and about.environment.time_limit
    final = [line for line in evaluations if line["step"] == agent.checkpoint_step]
    header: dict[str, Any] = {
        "library_name": "flowrl",
        "license": config.license,
        "pipeline_tag": "reinforcement-learning",
        "tags": ["offline-reinforcement-learning", "decision-transformer", "flow-attention"],
    }
    if about.environment:
        header["tags"].append(about.environment.env_id)
    if final:
        header["model-index"] = [{"name": config.repo, "results": [_result(line, dataset) for line in final]}]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "gymnasium", "mujoco", "numpy"))
    parts = [
        card_header(header),
        f"# {config.repo.split('/')[1]}",
        f"An agent of flowrl for {environment}: {_method(about)}, {agent.checkpoint_step} updates.",
        f"- Data: `{dataset}`, content SHA-256 `{about.dataset_sha256}`\n"
        f"- Environment: {environment}{f', at most {limit} timesteps' if limit else ''}\n"
        f"- Versions: {packages}",
        "## Scores\n\n"
        + (_score_table(final) if final else "No evaluation of this checkpoint is recorded with it."),
    ]
    if about.chosen_by:
        parts.append(f"This checkpoint was chosen by {about.chosen_by}: such a score is optimistic.")
    if curve:
        parts.append(f"![score over updates]({CURVE})")
    if config.video is not None:
        parts.append('<video src="video.mp4" controls></video>')
    if about.environment:
        parts.append(f"## Use\n\n```python\n{_USE.format(repo=config.repo, target=max(about.targets))}```")
    return "\n\n".join(parts) + "\n"


_USE = """import flowrl
from flowrl.envs.vector import make_env

agent = flowrl.load_agent("hf:{repo}")
env = make_env(agent.environment)
observation, _ = env.reset(seed=0)
agent.reset(None, target_return={target:g})
reward, over = None, False
while not over:
    observation, reward, terminated, truncated, _ = env.step(agent.act(observation, reward))
    over = terminated or truncated
"""


def _method(about: AgentConfig) -> str:
    model = about.model
    if isinstance(model, BehaviorCloningConfig):
        return f"behaviour cloning, a perceptron of {model.num_layers} layers, {model.embed_dim} wide"
    context = "whole episodes" if about.full_episodes else f"windows of {about.context_length} timesteps"
    return (
        f"{model.attention} attention over {context}, {model.token_layout} tokens, {model.num_layers} blocks "
        f"of width {model.embed_dim}"
    )


def _score_table(final: list[dict[str, Any]]) -> str:
    rows = []
    for line in final:
        score = _spread(line, "normalized_score") if "normalized_score_mean" in line else "no reference"
        rows.append((f"{line['target_return']:g}", str(line["episodes"]), _spread(line, "return"), score))
    table = markdown_table(("target return", "episodes", "return", "normalised score"), rows)
    return f"{table}\n\nMean ± standard deviation over episodes, of this checkpoint and one training seed."


def _spread(line: dict[str, Any], name: str) -> str:
    return f"{line[f'{name}_mean']:.1f} ± {line.get(f'{name}_std', 0.0):.1f}"


def _result(line: dict[str, Any], dataset: str) -> dict[str, Any]:
    """An entry of the Hub's model index."""
    values = {"mean_reward": _spread(line, "return")}
    if "normalized_score_mean" in line:
        values["normalized_score"] = _spread(line, "normalized_score")
    return {
        "task": {"type": "reinforcement-learning", "name": f"target return {line['target_return']:g}"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": [{"type": name, "value": value} for name, value in values.items()],
    }
