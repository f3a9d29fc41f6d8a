"""Agents of the package: all there, small, whole, and as good in 8 bits as their table says."""

import numpy as np
import pytest
import torch
from pretrained import quantized

from flowrl import load_agent
from flowrl.data.embedded import EMBEDDED
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import evaluate
from flowrl.model.pretrained import PRETRAINED_DIR, dequantized, pretrained_names


def test_datasets_of_flowrl_have_an_agent_with_a_score():
    assert set(pretrained_names()) == {*EMBEDDED, "tmaze-500"} - {"halfcheetah-hidden"}
    scores = (PRETRAINED_DIR / "scores.md").read_text()
    for name in pretrained_names():
        agent = load_agent(f"pretrained:{name}")
        assert agent.config.dataset_id.startswith("flowrl/")
        assert agent.acting == "recurrent"
        assert f"| `{name}` | `{agent.config.dataset_id}` |" in scores
    assert sum(path.stat().st_size for path in PRETRAINED_DIR.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize(("name", "lowest"), [("tmaze-500", 100.0), ("hopper-medium-expert", 100.0)])
def test_agents_score_from_their_8_bits(name, lowest):
    agent = load_agent(f"pretrained:{name}")
    (result,) = evaluate(
        agent, agent.environment, agent.config.targets[:1], 4, seed=3, reference=agent.config.reference
    )
    assert result.normalized_scores.mean() >= lowest


def test_8_bits_are_within_half_a_step_of_each_row():
    torch.manual_seed(0)
    rows = torch.randn(6, 40) * torch.tensor([1e-6, 1e-3, 1.0, 30.0, 1e5, 0.0])[:, None]
    tensors = {"weight": rows, "bias": torch.randn(6), "scale": torch.tensor(3.0)}
    stored = quantized(tensors)
    assert stored["weight"].dtype == torch.int8
    restored = dequantized(stored)
    assert restored.keys() == tensors.keys()
    assert torch.equal(restored["bias"], tensors["bias"])
    error = (restored["weight"] - rows).abs().amax(dim=1)
    assert (error <= rows.abs().amax(dim=1) / 254 * 1.001).all()
    np.testing.assert_array_equal(restored["weight"][5], 0)


def test_an_unknown_name_lists_the_agents():
    with pytest.raises(UserError, match=r"^pretrained:hoper: no such agent in the package; known: .*tmaze-5"):
        load_agent("pretrained:hoper")
