"""Training in one process: what an update is, what is written, what stops it, and how much it learns."""

import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from conftest import dataset_of, write_tiny_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_training import figures, resume_here, steps_on_disk, train_here

import flowrl
from flowrl.data import load_episodes
from flowrl.data.command import CollectCommand, run_collect
from flowrl.data.sampler import WindowSampler
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import episode_seeds, evaluate
from flowrl.model.checkpoint import load_checkpoint
from flowrl.model.transformer import SequenceModel
from flowrl.native.accelerate import accelerate_training
from flowrl.options import LARGEST_DIMENSION
from flowrl.training.config import TrainConfig
from flowrl.training.setup import (
    Stream,
    build_agent,
    default_targets,
    evaluation_seed,
    load_dataset,
    resolve,
    stream_seed,
)
from flowrl.training.trainer import NonFiniteLossError, Trainer, learning_rate_at


def test_learning_rate_follows_the_table():
    """Warm-up over 4 updates, then half a cosine from 1 to 0.1 over 8; worked out by hand."""
    config = TrainConfig(steps=12, warmup_steps=4, learning_rate=2.0)
    eighths = [1, 0.9657457, 0.8681981, 0.7222075, 0.55, 0.3777925, 0.2318019, 0.1342543, 0.1]
    expected = [0.25, 0.5, 0.75, 1.0, *eighths, 0.1, 0.1]
    assert [learning_rate_at(step, config) / 2 for step in range(15)] == pytest.approx(expected, abs=1e-7)
    constant = TrainConfig(steps=12, warmup_steps=2, learning_rate=2.0, schedule="constant")
    assert [learning_rate_at(step, constant) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate_at(0, TrainConfig(steps=1, warmup_steps=0, learning_rate=2.0)) == 2.0


@pytest.mark.parametrize(("native", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_automatic_bfloat16_is_for_gpus_that_compute_in_it(monkeypatch, native, precision):
    """Turing and Volta only emulate it."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    gpu = torch.device("cuda", 0)
    assert resolve(TrainConfig(), gpu).precision == precision
    assert resolve(TrainConfig(precision="bfloat16"), gpu).precision == "bfloat16"
    assert resolve(TrainConfig(), torch.device("cpu")).precision == "float32"


def test_the_run_folder_names_the_warm_up_and_precision_of_its_first_start(tiny_dataset, tmp_path):
    """So that a resume of more updates, on whatever device, keeps both."""
    run = train_here(tiny_dataset, tmp_path / "run", steps=10, eval_episodes=0).folder
    resume_here(run, steps=100, log_every=100)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["steps"], config["warmup_steps"], config["precision"]) == (100, 1, "float32")
    last = figures(run, "train")[-1]
    assert last["learning_rate"] == pytest.approx(1e-3 * 0.1, rel=0.01)  # the cosine ends at the new end


def test_updates_are_those_of_a_plain_loop(tiny_dataset, tmp_path):
    """Weights after 12 updates, with dropout, against AdamW, clipping and schedule written out here."""
    options = {"steps": 12, "eval_episodes": 0, "seed": 5, "learning_rate": 0.01, "warmup_steps": 3}
    train_here(tiny_dataset, tmp_path / "run", **options, ema_decay=0)
    train_here(tiny_dataset, tmp_path / "averaged", **options)
    config = TrainConfig(
        dataset=str(tiny_dataset), env="Hopper-v4", max_episode_steps=15,
        embed_dim=8, num_heads=2, num_layers=2, context_length=6,
    )  # fmt: skip
    dataset = load_dataset(config)
    torch.manual_seed(stream_seed(5, Stream.WEIGHTS))
    model = build_agent(config, dataset).model.train()
    accelerate_training(model)  # draws dropout as training does
    sampler = WindowSampler(dataset, 6, 4, seed=stream_seed(5, Stream.BATCHES))
    torch.manual_seed(stream_seed(5, Stream.DROPOUT))
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(12):
        gradients = torch.autograd.grad(model.loss(sampler.sample().window), parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        cosine = 0.01 * (0.55 + 0.45 * math.cos(math.pi * (step - 3) / 9))
        rate = 0.01 * (step + 1) / 3 if step < 3 else cosine
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * min(1.0, 0.25 / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.mul_(1 - rate * 1e-4)
                p.sub_(rate * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    trained = flowrl.load_agent(tmp_path / "run").model
    beside_average = load_checkpoint(tmp_path / "averaged", for_training=True).training_tensors
    assert norm > 0.25  # the clip was at work
    for (name, parameter), expected in zip(trained.named_parameters(), parameters, strict=True):
        assert (parameter - expected).abs().max() < 2e-5, name
        assert torch.equal(beside_average[f"model.{name}"], parameter)  # the average changes no update


def test_metrics_hold_every_figure(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines[:2]] == [("run", 0), ("train", 7)]
    assert lines[0]["environment"]["env_id"] == "Hopper-v4"
    assert len(lines[0]["dataset_sha256"]) == 64
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    for line in training:
        assert line.keys() == {
            *("kind", "step", "loss", "gradient_norm", "learning_rate"),
            *("tokens_per_second", "updates_per_second"),
        }
        assert min(line[name] for name in line if name not in ("kind", "step")) > 0
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [(line["step"], line["target_return"]) for line in evaluations] == [
        (step, target) for step in (25, 50, 60) for target in (30.0, 5.0)
    ]
    for line in evaluations:
        score = 100 * (line["return_mean"] + 20.272305) / (3234.3 + 20.272305)
        assert line["normalized_score_mean"] == pytest.approx(score)
        assert line["return_mean"] == pytest.approx(np.mean(line["returns"]))
        assert line["length_mean"] == pytest.approx(np.mean(line["lengths"]))
        assert len(line["returns"]) == len(line["normalized_scores"]) == line["episodes"] == 2


def test_tensorboard_shows_the_same_figures(finished):
    events = EventAccumulator(str(finished))
    events.Reload()
    started = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(started).session_start_info.hparams
    assert (shown["embed_dim"].number_value, shown["attention"].string_value) == (8, "flow")
    compared = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment.metric_infos
    assert {metric.name.tag for metric in compared} <= set(events.Tags()["scalars"])
    lines = figures(finished, "train")
    for name in set(lines[0]) - {"kind", "step"}:
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    for number, target in enumerate((30, 5), start=1):
        scores = events.Scalars(f"evaluation/target{number}/normalized_score_mean")
        lines = [line for line in figures(finished, "evaluation") if line["target_return"] == target]
        expected = [pytest.approx(line["normalized_score_mean"], rel=1e-6) for line in lines]
        assert [event.value for event in scores] == expected


def test_the_logged_loss_is_the_mean_over_its_updates(tiny_dataset, tmp_path, monkeypatch):
    seen, real = [], SequenceModel.loss

    def loss(self, window, guidance):
        value = real(self, window, guidance)
        seen.append(value.detach())
        return value

    monkeypatch.setattr(SequenceModel, "loss", loss)
    train_here(tiny_dataset, tmp_path / "run", steps=9, eval_episodes=0, log_every=4)
    expected = [float(torch.stack(part).mean()) for part in (seen[:4], seen[4:8], seen[8:])]
    assert [line["loss"] for line in figures(tmp_path / "run", "train")] == pytest.approx(expected, rel=1e-6)


def test_the_last_evaluation_is_that_of_the_saved_agent(finished):
    agent, lines = flowrl.load_agent(finished), figures(finished, "evaluation")
    assert agent.acting == "window"
    (seed,) = {line["seed"] for line in lines}
    results = evaluate(agent, agent.environment, [30.0, 5.0], 2, seed, agent.config.reference)
    for result, line in zip(results, lines[-2:], strict=True):
        assert (result.returns.tolist(), result.lengths.tolist()) == (line["returns"], line["lengths"])


def test_two_trainings_share_no_evaluation_start_unless_told_to():
    starts = [set(episode_seeds(evaluation_seed(TrainConfig(seed=seed)), 100)) for seed in (0, 1, 2)]
    assert len(set.union(*starts)) == 300
    assert evaluation_seed(TrainConfig(seed=1, eval_seed=7)) == evaluation_seed(TrainConfig(eval_seed=7)) == 7


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(unevaluated, tiny_dataset, tmp_path, monkeypatch, bad):
    """Update 23, between two logs and two checkpoints."""
    run, batches, real = tmp_path / "run", [], SequenceModel.loss
    sample = WindowSampler.sample

    def recorded(self):
        batches.append(sample(self))
        return batches[-1]

    def loss(self, window, guidance):
        value = real(self, window, guidance)
        if len(batches) == 23:  # a square root at 0: the loss is finite, its gradient is not
            return value * math.nan if bad == "loss" else (value - value).sqrt()
        return value

    with monkeypatch.context() as patch:
        patch.setattr(WindowSampler, "sample", recorded)
        patch.setattr(SequenceModel, "loss", loss)
        with pytest.raises(NonFiniteLossError, match=r"step 23: .*nonfinite\.json") as caught:
            train_here(tiny_dataset, run, eval_episodes=0)
    assert "\n" not in str(caught.value)
    record = json.loads((run / "nonfinite.json").read_text())
    assert record["step"] == 23
    assert record["windows"] == batches[22].spans.tolist()
    assert steps_on_disk(run)[-1] == "step-00000020"
    assert flowrl.load_agent(run).checkpoint_step == 20  # which refuses tensors that are not finite
    resume_here(run)
    assert figures(run) == figures(unevaluated)


def test_bfloat16_rounds_products_and_leaves_weights_alone(tiny_dataset, tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = tmp_path / precision
        train_here(
            tiny_dataset, run, steps=20, eval_episodes=0, dropout=0.0, log_every=1, precision=precision
        )
        losses[precision] = [line["loss"] for line in figures(run, "train")]
        model = load_checkpoint(run, for_training=True).model
        assert {tensor.dtype for tensor in model.values()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_an_agent_learns_its_units_from_the_data():
    rewards, actions = np.array([1.0, 2.0, 3.0, -50.0, 10.0]), [[0, 5], [1, 5], [-2, 5], [0.5, 5], [0, 5]]
    dataset = dataset_of(np.zeros((5, 11)), np.array(actions, float), rewards, (3, 2))
    agent = build_agent(TrainConfig(embed_dim=8, num_heads=2), dataset)
    assert agent.model.action_low.tolist() == [-2.0, 4.0]  # nothing to scale a constant by
    assert agent.model.action_high.tolist() == [1.0, 6.0]
    assert float(agent.model.return_scale) == 40.0
    assert agent.config.targets == default_targets(dataset) == (6.0, -40.0)
    assert agent.config.context_length == 3  # the data has no longer episode
    assert agent.config.model.max_timesteps == 3
    assert agent.acting == "window"
    whole = build_agent(
        TrainConfig(embed_dim=8, num_heads=2, context_length="episode", return_scale=7.0, targets=(1.0,)),
        dataset,
    )
    assert (whole.acting, float(whole.model.return_scale), whole.config.targets) == ("recurrent", 7.0, (1.0,))
    spec = EnvironmentSpec("Hopper-v4")
    of_hopper = dataset_of(np.zeros((5, 11)), np.zeros((5, 3)), rewards, (3, 2), environment=spec)
    hopper = build_agent(TrainConfig(embed_dim=8, num_heads=2), of_hopper)
    assert hopper.model.action_low.tolist() == [-1.0] * 3
    assert hopper.config.model.max_timesteps == gymnasium.spec("Hopper-v4").max_episode_steps
    endless = replace(of_hopper, environment=EnvironmentSpec("Hopper-v4", max_episode_steps=10**7))
    without_time = TrainConfig(embed_dim=8, num_heads=2, time_encoding="none")
    assert build_agent(without_time, endless).config.model.max_timesteps == LARGEST_DIMENSION


@pytest.mark.parametrize(
    ("returns", "targets"),
    [
        ((-5.0, -30.0, -20.0), (-5.0, -20.0)),  # half of the best would be better than the best
        ((0.0, 0.0, -1.0), (0.0,)),
        ((1.0, 2.0, 3.0, 400.0), (400.0, 2.0)),
        ((7.0,), (7.0,)),
    ],
)
def test_default_targets_are_the_best_and_the_median_episode_s(returns, targets):
    n = len(returns)
    dataset = dataset_of(np.zeros((n, 11)), np.zeros((n, 3)), np.array(returns), np.ones(n, int))
    assert default_targets(dataset) == targets
    given = TrainConfig(embed_dim=8, num_heads=2, targets=(3.0, 1.0, 3.0))
    assert build_agent(given, dataset).config.targets == (3.0, 1.0)


def test_a_run_folder_is_never_overwritten(tiny_dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("")
    with pytest.raises(UserError, match="already there and not empty; continue it with --resume"):
        train_here(tiny_dataset, tmp_path / "run")
    with pytest.raises(UserError, match="precious: a file is there; give a new folder"):
        train_here(tiny_dataset, tmp_path / "run" / "precious")
    (tmp_path / "run" / "precious").rename(tmp_path / "run" / ".lock")  # left by a start that was killed
    (tmp_path / "run" / ".config.yaml.1.tmp").touch()
    (tmp_path / "run" / ".film.mp4.2.tmp").touch()  # of another command
    train_here(tiny_dataset, tmp_path / "run", steps=1, eval_episodes=0)
    assert [path.name for path in (tmp_path / "run").glob(".*.tmp")] == [".film.mp4.2.tmp"]
    with pytest.raises(UserError, match="cannot be written"):
        train_here(tiny_dataset, "/proc/absent/run")


def test_the_best_normalised_score_needs_reference_scores():
    data = dataset_of(np.zeros((5, 3)), np.zeros((5, 1)), np.ones(5), (5,))
    config = TrainConfig(env="Pendulum-v1", keep_best="normalized_score_mean")
    with pytest.raises(UserError, match="normalized_score_mean: there is none without --reference-scores"):
        load_dataset(config, data)


def test_training_works_outside_the_main_thread(tiny_dataset, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train_here, tiny_dataset, tmp_path / "run", steps=5).result()
    assert len(run.results) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_average_is_the_recursion_over_all_updates(tiny_dataset, tmp_path, monkeypatch):
    weights, update = [], Trainer.update

    def recorded(self):
        if not weights:
            weights.append([p.detach().double().clone() for p in self.state.model.parameters()])
        update(self)
        weights.append([p.detach().double().clone() for p in self.state.model.parameters()])

    monkeypatch.setattr(Trainer, "update", recorded)
    train_here(tiny_dataset, tmp_path / "run", steps=40, ema_decay=0.7)
    average = weights[0]
    for update, current in enumerate(weights[1:]):
        decay = min(0.7, (1 + update) / (10 + update))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, current, strict=True)]
    agent = flowrl.load_agent(tmp_path / "run")
    for loaded, expected, last in zip(agent.model.parameters(), average, weights[-1], strict=True):
        torch.testing.assert_close(loaded.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(loaded.double(), last)


@pytest.fixture(scope="module")
def extreme(tmp_path_factory):
    path = tmp_path_factory.mktemp("extreme") / "extreme.hdf5"
    write_tiny_dataset(path, reward_scale=3000.0)
    dataset = load_episodes(str(path), "Hopper-v4")
    assert dataset.returns_to_go.max() > 1e5
    assert np.ptp(dataset.observations[:, 4]) == 0
    assert (np.abs(dataset.actions).max(axis=1) == 1).any()
    return path


@pytest.mark.parametrize(
    "options", [{"precision": "bfloat16"}, {"token_layout": "fused"}, {"attention": "softmax"}]
)
def test_300_updates_and_acting_stay_finite(extreme, tmp_path, options):
    """Whole episodes; unscaled returns of 1e5 enter the network as they are, so do targets beyond them."""
    train_here(
        extreme, tmp_path / "run", context_length="episode", return_scale=1, steps=300, log_every=50,
        checkpoint_every=300, eval_episodes=0, **options,
    )  # fmt: skip
    lines = figures(tmp_path / "run", "train")
    assert np.isfinite([line["gradient_norm"] for line in lines]).all()
    assert lines[-1]["loss"] < lines[0]["loss"]  # it fell
    for acting in ("recurrent", "window"):
        agent, random = flowrl.load_agent(tmp_path / "run", acting=acting), np.random.default_rng(0)
        agent.reset(4, np.array([1e5, -1e5, 1e15, 0.0]))
        for step in range(60):
            observations = random.normal(size=(4, 11)) * np.array([[1.0], [1e6], [1e15], [0.0]])
            rewards = None if step == 0 else random.normal(size=4) * np.array([1e5, 1e15, 1.0, 0.0])
            actions = agent.act(observations, rewards)
            assert np.isfinite(actions).all()
            assert (np.abs(actions) <= 1).all()


# Seeds 0, 1 and 2 scored 62, 77 and 78 when this was written; a thirtieth of the learning rate 44, actions of
# other transitions 8, no learning 4. The behaviour policies score 67 on average.
FLOOR = 50.0


def test_a_small_training_reaches_a_normalized_score_of_50(tmp_path):
    """Half medium, half expert episodes of Hopper; 800 updates of a small model; the expert's return."""
    data = tmp_path / "hopper.hdf5"
    run_collect(
        CollectCommand("hopper", policies=("medium", "expert"), steps=20_000, format="d4rl", out=data)
    )
    run = train_here(
        data, tmp_path / "run", env="Hopper-v5", max_episode_steps=None, token_layout="fused",
        context_length=20, batch_size=64, embed_dim=64, steps=800, learning_rate=3e-3, checkpoint_every=800,
        log_every=100, eval_every=0, eval_episodes=10, targets=3500, return_scale=1000,
    )  # fmt: skip
    assert run.results[0].normalized_scores.mean() > FLOOR
