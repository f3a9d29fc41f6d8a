"""The benchmark measures what it says: baselines compute the same, counts are right, reports are well formed.

Timings decide nothing here.
"""

import json
import runpy
from pathlib import Path

import attention
import gpu
import numpy as np
import pytest
import timing
import torch
import update
from attention import authors_flow_attention, make_inputs
from matplotlib.figure import Figure
from plots import draw_report
from products import ProductRunner, needed_products
from rollouts import (
    RawPhysics,
    evaluate_batch,
    evaluate_one_by_one,
    record_episodes,
    state_bytes,
)
from sampling import LoopSampler
from speed import BenchmarkConfig, run_benchmarks
from tables import Goal, Measurement, Row, Section, row_cells
from timing import Spread, Timing, peak_memory
from update import use_authors_attention
from workload import HOPPER, Sizes, make_agent, make_episodes, paper_config

from flowrl.attention import naive_flow_attention
from flowrl.data.sampler import WindowSampler
from flowrl.envs.vector import make_env
from flowrl.errors import UserError
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


@pytest.mark.parametrize("sums_returns", [True, False])
def test_the_loop_samples_the_same_windows(sums_returns):
    dataset = make_episodes(3_000, seed=3)
    drawn = torch.tensor([0, 5, 1, 2_999, 1_500, int(dataset.episode_starts[1]), 777])
    context = 250  # longer than some of the episodes
    episodes = np.searchsorted(dataset.episode_starts, drawn.numpy(), side="right") - 1
    before = np.cumsum(
        np.where(dataset.episode_lengths > context, context - 1, 0)
    )  # windows that begin early
    numbers = drawn + torch.from_numpy(before[episodes])
    all_at_once = WindowSampler(dataset, context, len(drawn), seed=0).gather(numbers.numpy())
    expected = all_at_once.window
    offsets = drawn.numpy() - dataset.episode_starts[episodes]
    loop = LoopSampler(dataset, context, len(drawn), 0, sums_returns=sums_returns)
    batch = loop.gather(episodes.tolist(), offsets.tolist())
    assert batch.num_timesteps == all_at_once.num_timesteps
    assert batch.window.valid.equal(expected.valid)
    assert batch.spans.equal(all_at_once.spans)
    valid = expected.valid
    assert batch.window.observations[valid].equal(expected.observations[valid])
    assert batch.window.actions[valid].equal(expected.actions[valid])
    assert batch.window.timesteps[valid].equal(expected.timesteps[valid])
    torch.testing.assert_close(batch.window.returns_to_go[valid], expected.returns_to_go[valid])
    later = valid & (expected.timesteps > 0)
    assert batch.window.previous_actions[later].equal(expected.previous_actions[later])


def test_every_contender_steps_through_the_recorded_episodes():
    episodes = record_episodes(5, "random")
    agent = make_agent(TINY, paper_config(TINY))
    assert evaluate_batch(agent, episodes).tolist() == episodes.lengths.tolist()
    assert evaluate_batch(None, episodes).tolist() == episodes.lengths.tolist()
    assert evaluate_one_by_one(agent, episodes, 2).tolist() == episodes.lengths[:2].tolist()
    final = RawPhysics(episodes).run()
    env = make_env(HOPPER)
    for episode, length in enumerate(episodes.lengths):
        env.reset(seed=episode)
        for action in episodes.actions[episode, :length]:
            env.step(action)
        np.testing.assert_array_equal(final[episode], env.unwrapped.data.qpos)


def test_remembered_bytes_grow_with_a_cache_and_not_with_flow():
    observations, rewards = np.zeros((3, 11)), np.zeros(3)
    sizes = {}
    for kind in ("flow", "softmax"):
        agent = make_agent(TINY, paper_config(TINY, kind))
        agent.acting = "recurrent"
        agent.reset(3, 1.0)
        sizes[kind] = []
        for _ in range(2):
            for _ in range(30):
                agent.act(observations, rewards)
            sizes[kind].append(state_bytes(agent))
    assert sizes["flow"][0] == sizes["flow"][1] > 3 * 16 * 4
    assert sizes["softmax"][1] > sizes["softmax"][0]


def test_needed_products_of_linear_layers_are_those_of_a_hooked_model():
    """2 x rows x inputs x outputs of every nn.Linear, three times, or twice where the inputs are data."""
    model = SequenceModel(ModelConfig(11, 3, 1000, num_layers=2, embed_dim=32))
    embeddings = (model.embed_return, model.embed_observation, model.embed_action)
    counted = 0

    def count(module, inputs, outputs):
        nonlocal counted
        counted += outputs.numel() * module.in_features * 2 * (2 if module in embeddings else 3)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    dataset = make_episodes(2_000)
    model(WindowSampler(dataset, 20, 4, seed=0).gather(np.arange(19, 23)).window)
    products = needed_products(model, 4, 20)
    attention = [product for product in products if product.batch > 1]
    assert sum(product.flops for product in products if product.batch == 1) == counted
    # Two products a layer and two gradients of each, on 4 x 4 sequences of 59 tokens, 8 wide.
    assert sum(product.flops for product in attention) == 2 * 6 * 2 * 16 * 59 * 59 * 8
    runner = ProductRunner(products)
    runner()
    assert runner.flops == sum(product.flops for product in products)
    assert runner.scale == pytest.approx(runner.flops / counted)


def test_ratios_are_taken_inside_each_round():
    slow, fast = Timing((2.0, 40.0, 6.0)), Timing((1.0, 10.0, 1.0))
    assert slow.ratio_to(fast) == Spread(4.0, 3.0, 5.0)
    assert slow.ratio_to(fast, factor=100.0).median == 400.0


def _hold(count: int) -> float:
    return float(np.ones(count, dtype=np.uint8).sum())


def test_peak_memory_counts_what_a_call_holds():
    megabytes = peak_memory(_hold, 200 << 20, warm_up=(1 << 10,)) / 2**20
    assert 190 < megabytes < 260


def test_a_missed_a_met_and_a_skipped_row():
    value = Spread(12.345, 10.0, 14.0)
    assert row_cells(Row("a", "b", "x", value, Goal(10.0)))[2:] == ["≥ 10x", "12.3x (10 to 14)", "met"]
    row = Row("a", "b", "%", value, Goal(2.0, at_least=False))
    assert row_cells(row)[2:] == ["≤ 2%", "12.3% (10 to 14)", "missed"]
    assert row_cells(Row("a", "b", "x", None, None, "too long"))[2:] == ["", "skipped: too long", ""]


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


def test_pictures_show_what_was_measured(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), path.touch()))
    lengths = [
        Measurement("flow", f"1 x 4 x {length} x 8", length, Timing((0.25, 0.5, 1.0)), memory)
        for length, memory in ((16, 0), (32, 1 << 20))  # 0: too little to add a page to the process
    ]
    sections = [
        Section("attention", measurements=lengths),
        Section("update", measurements=[Measurement("softmax", "update, 2 x 8", 16, Timing((0.5,)), None)]),
    ]
    assert draw_report(tmp_path / "whole", sections)
    time_axes, memory_axes, update_axes, rollout_axes = drawn[0].axes
    assert [line.get_xydata().tolist() for line in time_axes.lines] == [[[16, 0.5], [32, 0.5]]]
    assert [line.get_xydata().tolist() for line in memory_axes.lines] == [[[32, 1]]]
    assert [bar.get_width() for bar in update_axes.patches] == [32]  # timesteps per second
    assert not rollout_axes.patches
    assert draw_report(tmp_path / "empty", [Section("attention")])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_section_measures_every_row(monkeypatch):
    monkeypatch.setattr(gpu, "BATCH", 1)
    monkeypatch.setattr(gpu, "LENGTH_GOALS", {16: 1.0})
    section = gpu.measure_gpu(TINY, 1)
    assert [row.unit for row in section.rows] == ["ms", "x", "ms", "x", "x", "%"]
    assert all(row.measured is not None and row.measured.median > 0 for row in section.rows)


def test_unusable_options_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="--output"):
        run_benchmarks(BenchmarkConfig(output=tmp_path))
    script = Path(__file__).resolve().parents[1] / "scripts" / "benchmark" / "speed.py"
    monkeypatch.setattr("sys.argv", [str(script), "--only", "gpu", "--repetitions", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().err == "error: --repetitions 0: must be at least 1\n"
