"""The benchmark measures what it says: baselines compute the same, counts are right, reports are well formed.

Timings decide nothing here.
"""

import json

import attention
import pytest
import timing
import torch
import update
from attention import authors_flow_attention, make_inputs
from speed import BenchmarkConfig, run_benchmarks
from update import use_authors_attention
from workload import Sizes, make_episodes

from flowrl.attention import naive_flow_attention
from flowrl.data.sampler import WindowSampler
from flowrl.model.transformer import ModelConfig, SequenceModel

TINY = Sizes(
    windows=(2, 4, 12, 8),
    lengths=(16,),
    num_layers=1,
    embed_dim=16,
    batch_size=2,
    episode_batch_size=1,
    episode_length=60,
    large_batch=4,
    transitions=800,
    episodes=2,
    baseline_episodes=1,
    behavior="random",
    late_step=14,
)


@pytest.mark.parametrize("length", [1, 2, 61])
def test_the_authors_form_is_the_naive_formula(length):
    inputs = tuple(x.detach().double().mul(3).requires_grad_() for x in make_inputs((2, 3, length, 8)))
    weights = torch.randn(2, 3, length, 8, dtype=torch.float64)
    results = []
    for form in (authors_flow_attention, naive_flow_attention):
        outputs = form(*inputs)
        results.append((outputs, *torch.autograd.grad((outputs * weights).sum(), inputs)))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)


def test_a_model_with_the_authors_form_predicts_the_same():
    dataset = make_episodes(400)
    window = WindowSampler(dataset, 20, 8, seed=1).sample().window
    model = SequenceModel(ModelConfig(11, 3, 1000, num_layers=2, embed_dim=32)).eval()
    expected = model(window)
    use_authors_attention(model)
    torch.testing.assert_close(model(window), expected, rtol=1e-4, atol=1e-5)


def test_a_tiny_run_writes_json_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 1e-3)
    for module in (attention, update):  # fresh processes, which have a test of their own
        monkeypatch.setattr(module, "peak_memory", lambda *_, **__: 1)
    output = tmp_path / "results" / "tiny"
    sections = run_benchmarks(BenchmarkConfig(repetitions=2, output=output, sizes=TINY))
    document = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert list(document["sections"]) == ["attention", "update", "sampling", "rollouts", "profile", "gpu"]
    assert document["machine"]["versions"]["torch"] == torch.__version__
    for section in sections:
        stored = document["sections"][section.name]
        assert len(stored["rows"]) == len(section.rows)
        for row in stored["rows"]:
            assert (row["measured"] is None) == bool(row["skipped"])
            if row["measured"] is not None:
                assert 0 < row["measured"]["low"] <= row["measured"]["median"] <= row["measured"]["high"]
            assert row["goal"] is None or isinstance(row["met"], bool) or row["skipped"]
        for measurement in stored["measurements"]:
            assert len(measurement["seconds"]["samples"]) == 2
    table = (tmp_path / "results" / "tiny.md").read_text().splitlines()
    header = table.index("| what | against | goal | measured |  |")
    rows = sum(len(section.rows) for section in sections)
    assert all(line.count("|") == 6 for line in table[header : header + 2 + rows])
    assert not list(tmp_path.rglob("*.tmp"))
