"""The embedded datasets: their table, when they are used, and what is refused in their place."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import write_tiny_dataset

from flowrl.data import embedded, load_episodes, writers
from flowrl.data.collect import Part, Recipe, collect, to_dataset
from flowrl.data.embedded import EMBEDDED, load_embedded
from flowrl.data.writers import collect_minari
from flowrl.envs.reference_scores import REFERENCE_SCORES
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError

SMALL = Recipe("hopper", (Part("25k"),), steps=300, seed=4)
ID = "flowrl/hopper/medium-v0"


@pytest.fixture(autouse=True)
def folders(own_folders, monkeypatch):
    """A hopper-medium that is quickly collected."""
    monkeypatch.setitem(EMBEDDED, "hopper-medium", SMALL)
    monkeypatch.delitem(embedded._SHA256, "hopper-medium")
    return own_folders


def test_without_file_and_network_the_embedded_data_stands_in(folders, capsys):
    dataset = load_episodes("hopper-medium")
    error = capsys.readouterr().err
    assert "hopper_medium-v2.hdf5 is not in" in error
    assert f"using flowrl's own data {ID}, NOT D4RL's hopper-medium" in error
    assert dataset.sha256 == to_dataset(collect(SMALL), "x").sha256
    assert dataset.dataset_id == ID
    assert (dataset.environment, dataset.reference) == (
        EnvironmentSpec("Hopper-v5", max_episode_steps=1000),
        REFERENCE_SCORES["hopper"],
    )
    assert len(dataset.notes) == 1
    assert "scores compare only with scores on the same data" in dataset.notes[0]
    mapped = load_episodes("flowrl", "hopper-medium", memory_map=folders / "map")
    assert mapped.sha256 == dataset.sha256
    assert isinstance(mapped.observations, np.memmap)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_episodes("hopper-expert")  # flowrl has none of that name


def test_d4rls_file_comes_first_and_flowrls_data_can_be_forced(folders):
    (folders / "d4rl").mkdir()
    write_tiny_dataset(folders / "d4rl" / "hopper_medium-v2.hdf5")
    assert load_episodes("hopper-medium").num_transitions == 60
    assert not (folders / "minari").exists()
    forced = load_episodes("flowrl", "hopper-medium")
    assert forced.dataset_id == ID
    assert forced.environment == EnvironmentSpec("Hopper-v5", max_episode_steps=1000)
    assert load_episodes("hopper-medium").num_transitions == 60
    (folders / "d4rl" / "hopper_medium-v2.hdf5").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable HDF5 file"):  # not replaced behind the user's back
        load_episodes("hopper-medium")


def test_stored_data_that_changed_or_is_of_another_recipe_is_refused(folders, monkeypatch):
    load_embedded("hopper-medium")
    folder = folders / "minari" / ID / "data"
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        file["episode_0/rewards"][0] += 0.5
    with pytest.raises(UserError, match=r"content is not what was collected .* hopper-medium --overwrite"):
        load_embedded("hopper-medium")
    (folder / "main_data.hdf5").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_embedded("hopper-medium")
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text("{")
    with pytest.raises(UserError, match=r"metadata\.json: not the metadata of a dataset that flowrl"):
        load_embedded("hopper-medium")
    metadata["flowrl"]["policy_sha256"]["25k"] = "0" * 64
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="not collected by this version's recipe and policies"):
        load_embedded("hopper-medium")
    collect_minari(replace(SMALL, seed=5), ID, overwrite=True)
    with pytest.raises(UserError, match=r"not collected by this version's recipe and policies.*--overwrite"):
        load_embedded("hopper-medium")
    collect_minari(SMALL, ID, overwrite=True)
    with monkeypatch.context() as patch:  # as on a read-only disk
        patch.setattr(writers, "staging", lambda *_: pytest.fail("wrote"))
        load_embedded("hopper-medium")
