"""Methods from outside: their results stand in a report. Their own library is not needed here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
from peers import DecisionTransformerPolicy, PeersConfig, train_and_evaluate

from flowrl.data import load_episodes
from flowrl.report.runs import NORMALIZED, load_runs


class StubAlgorithm:
    """Answers with the observation's first numbers, too large by far."""

    def predict(self, observations: np.ndarray) -> np.ndarray:
        return 100 * observations[:, :3]


class StubWrapper:
    """A slot of a Decision Transformer that counts what is left of its target."""

    def __init__(self, target_return: float) -> None:
        self.left = target_return

    def predict(self, observation: np.ndarray, reward: float) -> np.ndarray:
        self.left -= reward
        return np.array([self.left])


def test_a_result_is_read_by_the_report(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "load_embedded", lambda _: load_episodes(str(tiny_dataset), "Hopper-v5"))
    monkeypatch.setattr(peers, "make_algorithm", lambda *_: StubAlgorithm())
    monkeypatch.setattr(peers, "train", lambda *_: 7)
    monkeypatch.setattr(peers, "version", lambda package: "1.0")
    document = train_and_evaluate(PeersConfig(steps=5000, episodes=3), "hopper-medium", "td3bc", seed=2)
    (tmp_path / "result.json").write_text(json.dumps(document))
    [run], unfinished = load_runs([tmp_path / "result.json"])
    assert not unfinished
    assert (run.method, run.seed, run.environment) == ("d3rlpy TD3+BC, 5,000 steps", 2, "Hopper-v5")
    assert run.config["gradient_steps"] == 7
    [scores] = run.policies(NORMALIZED)
    assert len(scores) == 3
    assert run.last_score(NORMALIZED) == pytest.approx(scores.mean())
    assert run.achieved == {}  # it has no target


def test_slots_of_a_decision_transformer_keep_their_own_rewards() -> None:
    class Algorithm:
        def as_stateful_wrapper(self, target_return: float) -> Any:
            return StubWrapper(target_return)

    policy = DecisionTransformerPolicy(Algorithm())
    policy.reset(3, np.array([0.9, 0.5, 0.1]))
    assert policy.act(np.zeros((3, 2))).ravel().tolist() == [0.9, 0.5, 0.1]
    policy.keep(np.array([2, 0]))
    acted = policy.act(np.zeros((2, 2)), np.array([0.2, 5.0]))
    np.testing.assert_allclose(acted.ravel(), [-0.1, -1.0])  # 0.9 - 5, clipped
