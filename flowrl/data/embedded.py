"""The datasets that flowrl ships as recipes, collected on first use by the policies that it ships.

They are not D4RL's: other policies, other environments (-v5), fewer steps. Scores on one of them compare with
scores on the same data only.
"""

import sys
from dataclasses import replace
from pathlib import Path

from flowrl.data.collect import Part, Recipe
from flowrl.data.dataset import EpisodeDataset
from flowrl.data.minari import load_minari
from flowrl.data.writers import ensure_minari, read_provenance
from flowrl.envs.hidden_dynamics import HIDDEN_IDS
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError, did_you_mean

SOURCE = "flowrl"  # what --dataset takes


# A replay set holds what the training run saw on its way to its medium policy: each snapshot stands for the
# training steps around it, which are the shares (in thousands of steps).
_REPLAYS = {
    "hopper": "random=12 25k=38 75k=50 125k=38 150k=25 175k=25 200k=25 225k=62 medium=50",
    "halfcheetah": "random=12 25k=25 50k=25 75k=25 medium=13",
    "walker2d": "random=12 25k=38 75k=50 125k=50 175k=75 275k=100 375k=62 400k=38 medium=50",
}
# The policy of every run-up, then those that run at the target speeds; each meets all cues, right and wrong.
_CUED = {
    "hopper-cued": "350k 350k expert",
    "halfcheetah-cued": "medium 50k 225k expert",
    "walker2d-cued": "medium 400k expert",
}
# In the trial the expert as for the robot as built, then two that are given the world.
_HIDDEN = {f"{robot}-hidden": EnvironmentSpec(env_id) for robot, env_id in HIDDEN_IDS.items()}
ROBOT_TASKS = (*_CUED, *_HIDDEN)
# Of the content where it was published; other processors or versions of MuJoCo may differ slightly.
_SHA256 = {
    "hopper-medium": "f401a3462b2fb1f3caa2f59f0bd4741ac81e153fc4aced41382fe35c4b6ad502",
    "hopper-medium-replay": "025fe06c4e849674d32aba608980bf2714426ac4f1a791cfe0611c23ef683c74",
    "hopper-medium-expert": "26a1e718bdf4011a3a4c8c10f654607d5ea387386148207f17ab9c695bdb4750",
    "halfcheetah-medium": "95d8309f7048a5fee6a2a0756378b00b32c50c6e4ab7e5e53f19b5fc0c03b47b",
    "halfcheetah-medium-replay": "2e55a86ff6ec7990457f2262b800b7a09f2c83628da24a2c4947ca0550b4477a",
    "halfcheetah-medium-expert": "a20872ba8d71e8398f73626a4f37071cb6de1e0db6e0762d5cc4f8cd08fbce64",
    "walker2d-medium": "aa7a82d947ffbe4638d07f94e9a4ff5f449ec17772684039fb0593c97da077c4",
    "walker2d-medium-replay": "b3710861353674cf1e1e710403a5a1a413dbec6f2c49fce38c43b6512ebed806",
    "walker2d-medium-expert": "a9b887c03cb15232df2442120141f4e3ab179ca063618199f8dc14a70d4a1ad0",
}


def _recipe(name: str) -> Recipe:
    environment, _, level = name.partition("-")
    if name in _CUED:
        opening, *cued = _CUED[name].split()
        return Recipe(environment, tuple(map(Part.parse, cued)), seed=5, opening=opening)
    if name in _HIDDEN:
        parts = (Part("medium"), Part("expert"))
        return Recipe(environment, parts, seed=6, opening="expert", spec=_HIDDEN[name])
    policies, seed = {
        "medium": ("medium", 1),
        "medium-replay": (_REPLAYS[environment], 2),
        "medium-expert": ("medium expert", 3),
    }[level]
    return Recipe(environment, tuple(map(Part.parse, policies.split())), seed=seed)


EMBEDDED = {name: _recipe(name) for name in (*_SHA256, *ROBOT_TASKS)}


def embedded_id(name: str) -> str:
    """Return the Minari id of the embedded dataset that ``--env`` calls ``name``.

    ``"hopper-medium-replay"`` is ``"flowrl/hopper/medium-replay-v0"``.
    """
    environment, _, level = name.partition("-")
    return f"{SOURCE}/{environment}/{level}-v0"


def embedded_recipe(name: str) -> Recipe:
    """Return the recipe of an embedded dataset; a UserError for an unknown name suggests the closest."""
    if name not in EMBEDDED:
        raise UserError(f"no embedded dataset '{name}'{did_you_mean(name, EMBEDDED)}")
    return EMBEDDED[name]


def load_embedded(name: str, memory_map: Path | None = None, why: str = "") -> EpisodeDataset:
    """Load the embedded dataset ``name`` ("hopper-medium"), collecting it on first use.

    Args:
        name: a key of ``EMBEDDED``.
        memory_map: folder in which its arrays are kept, to be read as needed.
        why: reason for using this data, printed before its name.

    Raises:
        UserError: no such dataset, policies or stored data that are not what they should be, or a disk that
            cannot be written.
    """
    recipe, dataset_id = embedded_recipe(name), embedded_id(name)
    not_d4rls = "" if name in ROBOT_TASKS else f", NOT D4RL's {name}"
    print(f"{why}{'; ' if why else ''}using flowrl's own data {dataset_id}{not_d4rls}", file=sys.stderr)
    folder = ensure_minari(recipe, dataset_id)
    dataset = load_minari(dataset_id, memory_map)
    if dataset.sha256 != read_provenance(folder).get("sha256"):
        raise UserError(
            f"{folder}: its content is not what was collected (SHA-256 {dataset.sha256}): collect it again, "
            f"flowrl collect {name} --overwrite"
        )
    notes = [
        f"THIS IS flowrl's OWN DATA {dataset_id}{not_d4rls}: "
        "its scores compare only with scores on the same data"
    ]
    published = _SHA256.get(name, dataset.sha256)
    if dataset.sha256 != published:
        notes.append(
            f"collected here, {dataset_id} has SHA-256 {dataset.sha256}, where it was published "
            f"{published}: another processor or version of MuJoCo; compare scores on this machine only"
        )
    return replace(dataset, dataset_id=dataset_id, notes=(*notes, *dataset.notes))
