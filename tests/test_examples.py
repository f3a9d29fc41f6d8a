"""The examples of scripts/examples, each run as a program."""

import re
import runpy
import sys

import minari
import numpy as np
import pytest
from processes import REPOSITORY
from tiny_training import train_here

from flowrl import load_agent
from flowrl.data.collect import Part, Recipe
from flowrl.data.writers import collect_minari
from flowrl.envs.specs import EnvironmentSpec
from flowrl.evaluation.rollout import rollout

EXAMPLES = REPOSITORY / "scripts" / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *words: object) -> None:
    """Run an example with these arguments."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks
def test_train_on_a_minari_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collect_minari(Recipe("hopper", (Part("25k"),), steps=300, seed=4), "mine/hopper-v0")
    run(monkeypatch, "train_on_minari.py", "mine/hopper-v0", tmp_path / "run", 3)
    agent = load_agent(tmp_path / "run")
    assert (agent.checkpoint_step, agent.acting) == (3, "recurrent")
    assert agent.config.dataset_id == "minari:mine/hopper-v0"
    best = max(float(sum(episode.rewards)) for episode in minari.load_dataset("mine/hopper-v0"))
    assert re.search(rf"^target {best:g}: mean return ", capsys.readouterr().out, re.MULTILINE)


def test_act_in_a_vector_environment(tiny_dataset, tmp_path, monkeypatch, capsys):
    train_here(tiny_dataset, tmp_path / "run", env="Hopper-v5", steps=2, eval_episodes=0)
    capsys.readouterr()
    run(monkeypatch, "act_in_vector_env.py", tmp_path / "run", "Hopper-v5", 30)
    mean = float(capsys.readouterr().out.split()[2])
    seeds = np.arange(8)  # those that Gymnasium gives to environments next to one another
    expected = rollout(load_agent(tmp_path / "run"), EnvironmentSpec("Hopper-v5"), np.full(8, 30.0), seeds)
    assert mean == pytest.approx(expected.returns.mean(), abs=0.06)


def test_attention_in_a_module_of_ones_own(monkeypatch, capsys):
    run(monkeypatch, "attention_in_a_module.py", 50)
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5  # between the parallel form and its steps
