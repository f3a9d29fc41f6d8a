"""Agents of the package: all there, small, whole, and as good in 8 bits as their table says."""

import pytest

from flowrl import load_agent
from flowrl.data.embedded import EMBEDDED
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import evaluate
from flowrl.model.pretrained import PRETRAINED_DIR, pretrained_names


def test_datasets_of_flowrl_have_an_agent_with_a_score():
    assert set(pretrained_names()) == {*EMBEDDED, "tmaze-500"} - {"halfcheetah-hidden"}
    scores = (PRETRAINED_DIR / "scores.md").read_text()
    for name in pretrained_names():
        agent = load_agent(f"pretrained:{name}")
        assert agent.config.dataset_id.startswith("flowrl/")
        assert agent.acting == "recurrent"
        assert f"| `{name}` | `{agent.config.dataset_id}` |" in scores
    assert sum(path.stat().st_size for path in PRETRAINED_DIR.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("name", ["tmaze-500", "hopper-medium-expert"])
def test_agents_score_from_their_8_bits(name):
    agent = load_agent(f"pretrained:{name}")
    target, reference = agent.config.targets[:1], agent.config.reference
    (result,) = evaluate(agent, agent.environment, target, 2, seed=3, reference=reference)
    assert result.normalized_scores.mean() >= 100


def test_an_unknown_name_lists_the_agents():
    with pytest.raises(UserError, match=r"^pretrained:hoper: no such agent in the package; known: .*tmaze-5"):
        load_agent("pretrained:hoper")
