"""A collected dataset on the Hugging Face Hub, laid out as minari downloads it, with a card of its recipe."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flowrl.data.dataset import EpisodeDataset
from flowrl.data.minari import read_minari
from flowrl.data.writers import read_provenance
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.report.table import markdown_table
from flowrl.sharing.push import CARD, card_header, hub_errors, refuse_paths, send_folder

NAMESPACE = "namespace_metadata.json"  # where minari looks up what a repository holds


def check_push(dataset_id: str, owner: str, environment: EnvironmentSpec, dry_run: Path | None) -> None:
    """Refuse what :func:`push_dataset` could not send, before anything is collected.

    Raises:
        UserError: an id without a namespace, an owner that is no name, options of the environment that are
            paths of this machine, a folder for a dry run that is there already.
    """
    if "/" not in dataset_id:
        raise UserError(f"--id {dataset_id}: its first part names the repository, as in mine/hopper/mixed-v0")
    if not owner or "/" in owner:
        raise UserError(
            f"--push {owner}: expected a user or an organisation; the repository is named by --id"
        )
    refuse_paths(environment)
    if dry_run is not None and dry_run.exists():
        raise UserError(f"--dry-run {dry_run}: already there")


def push_dataset(dataset_id: str, folder: Path, owner: str, dry_run: Path | None = None) -> str:
    """Send a dataset of minari's local storage to the repository ``owner/<first part of its id>``.

    Others load it with ``MINARI_REMOTE=hf://OWNER`` as ``minari:ID``. A repository holds any number of
    datasets; its first page lists them.

    Args:
        dataset_id: as :func:`check_push` accepts it.
        folder: the dataset's, as collected by flowrl.
        owner: user or organisation of the Hub.
        dry_run: a new folder for what would be sent; then nothing is sent.

    Returns:
        The commit's address, or what was written.

    Raises:
        UserError: a damaged dataset, or a Hub that cannot be reached, refuses, or holds a damaged list.
    """
    name, _, place = dataset_id.partition("/")
    repo = f"{owner}/{name}"
    with tempfile.TemporaryDirectory() as temporary:
        root = dry_run or Path(temporary) / "dataset"
        card = _card(dataset_id, owner, read_minari(dataset_id), read_provenance(folder))
        shutil.copytree(folder, root / place)
        (root / place / CARD).write_text(card, encoding="utf-8")
        known = {} if dry_run else _registered(repo)
        parts = place.split("/")[:-1]
        namespaces = {"/".join([name, *parts[: end + 1]]) for end in range(len(parts))}
        known["datasets"] = sorted({*known.get("datasets", ()), dataset_id})
        known["namespaces"] = sorted({*known.get("namespaces", ()), *namespaces})
        (root / NAMESPACE).write_text(json.dumps(known), encoding="utf-8")
        for namespace in namespaces:
            (root / namespace.partition("/")[2] / NAMESPACE).write_text("{}", encoding="utf-8")
        (root / CARD).write_text(_first_page(repo, known["datasets"]), encoding="utf-8")
        if dry_run is not None:
            files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
            return f"{root}: {', '.join(files)}; nothing was sent"
        return f"sent to {send_folder(root, repo, 'dataset', f'Upload {dataset_id}')}"


def _registered(repo: str) -> dict[str, Any]:
    """The repository's list of what it holds; empty where there is none yet.

    A list that cannot be read is an error: sending a new one would drop the other datasets from it.
    """
    import huggingface_hub

    with hub_errors(repo):
        if not huggingface_hub.file_exists(repo, NAMESPACE, repo_type="dataset"):
            return {}
        path = huggingface_hub.hf_hub_download(repo, NAMESPACE, repo_type="dataset")
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(f"{repo}: its {NAMESPACE} is not a JSON object; repair it there first")
    return known


def _header(environments: list[str]) -> str:
    header = {
        "license": "mit",
        "task_categories": ["reinforcement-learning"],
        "tags": ["offline-reinforcement-learning", "minari", "flowrl", *environments],
    }
    return card_header(header)


def _first_page(repo: str, datasets: list[str]) -> str:
    lines = [f"- [{each}]({each.partition('/')[2]}/{CARD})" for each in datasets]
    return f"{_header([])}\n\n# {repo}\n\nDatasets for minari:\n\n" + "\n".join(lines) + "\n"


def _card(dataset_id: str, owner: str, dataset: EpisodeDataset, about: dict[str, Any]) -> str:
    recipe, environment = about["recipe"], about["environment"]
    hashes = about["policy_sha256"]
    policies = [
        (part["policy"], f"{part['share']:g}", f"{part['noise']:g}", hashes.get(part["policy"], "-")[:12])
        for part in recipe["parts"]
    ]
    returns = dataset.episode_returns
    spread = f"from {returns.min():.1f} to {returns.max():.1f}, mean {returns.mean():.1f}"
    if dataset.reference is not None:
        spread += f" (normalised {dataset.reference.normalized_score(float(returns.mean())):.1f})"
    use = f"MINARI_REMOTE=hf://{owner} flowrl train --dataset minari:{dataset_id}"
    parts = (
        _header([environment["env_id"]]),
        f"# {dataset_id}",
        "Collected by flowrl; not D4RL's nor Minari's own data, nor comparable with it.",
        f"- Environment: `{environment['env_id']}`, options {environment['kwargs'] or 'none'}\n"
        f"- {dataset.num_transitions} transitions, {dataset.num_episodes} episodes, "
        f"{int(dataset.terminated.sum())} of them terminated\n- Returns {spread}\n"
        f"- Content SHA-256 `{about['sha256']}`\n"
        f"- Versions: flowrl {about['flowrl_version']}, mujoco {about['mujoco_version']}",
        f"## Recipe\n\nSeed {recipe['seed']}, at least {recipe['steps']} transitions.\n\n"
        + markdown_table(("policy", "share", "noise", "its SHA-256"), policies),
        f"## Use\n\n```bash\n{use}\n```",
    )
    return "\n\n".join(parts) + "\n"
