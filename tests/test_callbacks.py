"""Training from Python: what is called when, what stops it, what is printed, and what a tracker receives."""

import json
import shutil
import signal

import numpy as np
import pytest
from tiny_training import OPTIONS, assert_same_end, figures, resume_here, train_here

import flowrl
from flowrl.data import EpisodeDataset, load_episodes
from flowrl.data.dataset import held_out
from flowrl.data.sampler import WindowSampler
from flowrl.errors import UserError
from flowrl.evaluation.command import EvaluateConfig, evaluate_run, options_of
from flowrl.model.checkpoint import BEST, load_checkpoint
from flowrl.report.runs import load_runs
from flowrl.training import trainer
from flowrl.training.trainer import Trainer

TINY = OPTIONS | {"targets": (30.0, 5.0)}


def train(dataset, run, *callbacks, **options):
    given = {**TINY, **options, "run_dir": run, "callbacks": list(callbacks), "progress_bar": False}
    return flowrl.train(dataset if isinstance(dataset, EpisodeDataset) else str(dataset), **given)


class Recorder(flowrl.Callback):
    def __init__(self, stop=lambda event, step: False):
        self.calls, self.stop = [], stop

    def record(self, event, step, value):
        self.calls.append((event, step, value))
        return self.stop(event, step)

    def on_start(self, folder, options):
        return self.record("start", 0, options)

    def on_log(self, step, figures):
        return self.record("log", step, figures["loss"])

    def on_evaluation(self, step, results):
        return self.record("evaluation", step, [result.returns.tolist() for result in results])

    def on_checkpoint(self, step, folder):
        return self.record("checkpoint", step, folder)


@pytest.fixture(scope="module")
def reference(tiny_dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("callbacks") / "run"
    return train_here(tiny_dataset, run, keep_best="return_mean").folder


def test_training_from_python_on_data_in_memory_is_that_of_the_command_without_its_output(
    reference, tiny_dataset, tmp_path, capfd
):
    recorder, handlers, before = Recorder(), [], signal.getsignal(signal.SIGINT)
    recorder.stop = lambda event, step: handlers.append(signal.getsignal(signal.SIGINT))
    run = train(load_episodes(str(tiny_dataset)), tmp_path / "run", recorder)
    assert capfd.readouterr() == ("", "")
    assert set(handlers) == {before}
    assert figures(run.folder) == figures(reference)
    assert (run.step, run.load_agent().checkpoint_step) == (60, 60)
    called = {name: [call[1:] for call in recorder.calls if call[0] == name] for name, _, _ in recorder.calls}
    assert called["start"][0][1]["embed_dim"] == 8
    assert called["log"] == [(line["step"], line["loss"]) for line in figures(reference, "train")]
    evaluations = [(line["step"], line["returns"]) for line in figures(reference, "evaluation")]
    assert [(s, v) for s, values in called["evaluation"] for v in values] == evaluations
    assert [step for step, _ in called["checkpoint"]] == [0, 10, 20, 30, 40, 50, 60]
    assert called["checkpoint"][-1][1] == run.folder / "checkpoints" / "step-00000060"


@pytest.mark.parametrize(("event", "step", "true"), [("log", 7, bool), ("evaluation", 50, np.bool_)])
def test_a_callback_stops_training_that_resumes_exactly(reference, tiny_dataset, tmp_path, event, step, true):
    recorder = Recorder(lambda *now: true(now == (event, step)))
    data = shutil.copy(tiny_dataset, tmp_path / "tiny.hdf5")
    run = train(data, tmp_path / "run", recorder, keep_best="return_mean")
    assert run.step == load_checkpoint(run.folder).step == step
    data.unlink()
    with pytest.raises(UserError, match=r"tiny\.hdf5: no such file; the data of the run may be given by"):
        flowrl.train(resume=run.folder)
    shutil.copy(tiny_dataset, data)
    assert flowrl.train(resume=run.folder, progress_bar=False).step == 60
    assert_same_end(run.folder, reference)
    assert_same_end(run.folder, reference, BEST)


@pytest.fixture
def made_up(monkeypatch):
    """Call with the scores of the evaluations to come."""
    real, scores = Trainer._keep_if_best, []

    def keep_if_best(self, result):
        score = scores.pop(0)
        return real(self, type(result)(30.0, np.full(2, score), result.lengths, np.full(2, score)))

    monkeypatch.setattr(Trainer, "_keep_if_best", keep_if_best)
    return scores.extend


def test_the_best_evaluated_checkpoint_is_kept_and_labelled(tiny_dataset, tmp_path, made_up, capsys):
    made_up((3.0, 7.0, 5.0))
    run = train_here(tiny_dataset, tmp_path / "run", keep_best="normalized_score_mean").folder
    agent = flowrl.load_agent(run, checkpoint="best")
    assert agent.checkpoint_step == 50
    chosen_by = "normalized_score_mean 7 of 2 episodes in training's own evaluations"
    assert chosen_by in agent.config.chosen_by
    kept = load_checkpoint(run, 50).model
    assert all((value == kept[name]).all() for name, value in agent.model.state_dict().items())
    assert flowrl.load_agent(run).config.chosen_by == ""
    capsys.readouterr()
    evaluate_run(EvaluateConfig(run, episodes=1, checkpoint="best", json=tmp_path / "best.json"))
    assert f"this checkpoint was chosen by {chosen_by}" in capsys.readouterr().out
    assert chosen_by in json.loads((tmp_path / "best.json").read_text())["chosen_by"]
    ((labelled,), _) = load_runs([tmp_path / "best.json"])
    assert labelled.method == "flow-interleaved-6, best by its own evaluation"
    assert options_of(run / "best") == options_of(next((run / "best" / "checkpoints").iterdir())) != {}
    (tmp_path / "best.json").rename(run / "evaluation.json")
    with pytest.raises(UserError, match="of the checkpoint that --keep-best chose"):
        load_runs([run])


def test_a_best_checkpoint_whose_evaluation_was_lost_in_a_kill_is_dropped(tiny_dataset, tmp_path, made_up):
    def killed(event, step):
        if (event, step) == ("evaluation", 50):
            raise KeyboardInterrupt

    made_up((3.0, 7.0, 2.0, 2.0))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_dataset, tmp_path / "run", Recorder(killed), keep_best="return_mean", checkpoint_every=99)
    resume_here(tmp_path / "run")
    agent = flowrl.load_agent(tmp_path / "run", checkpoint="best")
    assert (agent.checkpoint_step, agent.config.chosen_by.split()[1]) == (25, "3")


def test_a_callbacks_lost_connection_is_not_taken_for_the_run_folder(tiny_dataset, tmp_path):
    def fails(event, step):
        raise ConnectionError("no network")

    with pytest.raises(UserError, match=r"^Recorder\.on_start: ConnectionError: no network"):
        train(tiny_dataset, tmp_path / "run", Recorder(fails))


def test_an_unknown_option_best_without_one_and_an_absent_metric_are_refused(tiny_dataset, tmp_path):
    with pytest.raises(UserError, match=r"^train: setps: unknown option; did you mean 'steps'"):
        flowrl.train(env="hopper-medium", setps=3)
    message = "--keep-best success_rate: evaluations of this environment have none"
    with pytest.raises(UserError, match=message):
        train_here(tiny_dataset, tmp_path / "run", keep_best="success_rate", steps=3)
    with pytest.raises(UserError, match=r"--checkpoint best: .* has none; --keep-best keeps it"):
        flowrl.load_agent(tmp_path / "run", checkpoint="best")


def test_scores_of_another_metric_are_not_compared_with_the_best(tiny_dataset, tmp_path):
    train_here(tiny_dataset, tmp_path / "run", keep_best="return_mean", steps=3)
    resume_here(tmp_path / "run", keep_best="normalized_score_mean", steps=5)
    assert flowrl.load_agent(tmp_path / "run", checkpoint="best").checkpoint_step == 5
    scores = load_checkpoint(tmp_path / "run", for_training=True).training["best_scores"]
    metrics = ("return_mean", "normalized_score_mean")
    assert list(scores) == [f"{metric} at target 30, 2 episodes" for metric in metrics]


def test_a_best_checkpoint_that_was_not_saved_is_saved_after_a_resume(tiny_dataset, tmp_path, monkeypatch):
    real = trainer.save_checkpoint

    def save_checkpoint(folder, checkpoint, keep):
        if folder.name == BEST:
            raise KeyboardInterrupt
        return real(folder, checkpoint, keep)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", save_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train_here(tiny_dataset, tmp_path / "run", keep_best="return_mean", steps=3)
    resume_here(tmp_path / "run")
    assert flowrl.load_agent(tmp_path / "run", checkpoint="best").checkpoint_step == 3


def test_held_out_episodes_are_never_trained_on_and_their_loss_is_logged(tiny_dataset, tmp_path):
    """The loss is that of the saved agents, computed anew; a run that is stopped anywhere logs the same."""
    whole = load_episodes(str(tiny_dataset))
    trained_on, validation = held_out(whole, 0.3)
    assert validation.num_episodes == round(0.3 * whole.num_episodes)
    returns = np.concatenate((trained_on.episode_returns, validation.episode_returns))
    np.testing.assert_array_equal(np.sort(returns), np.sort(whole.episode_returns))
    mean = trained_on.observations.mean(axis=0)
    np.testing.assert_allclose(trained_on.statistics.observation_mean, mean, rtol=1e-4, atol=1e-5)
    options = {"validation_fraction": 0.3, "keep_checkpoints": 9, "checkpoint_every": 25}
    train_here(tiny_dataset, tmp_path / "run", **options)
    lines = figures(tmp_path / "run", "validation")
    assert [line["step"] for line in lines] == [25, 50, 60]
    sampler = WindowSampler(validation, 6, 4, seed=0)
    batch = sampler.gather(np.linspace(0, sampler.num_windows - 1, 40).astype(np.int64))
    for line in lines:
        agent = flowrl.load_agent(tmp_path / "run", checkpoint=line["step"])
        assert agent.model.loss(batch.window).item() == pytest.approx(line["loss"], rel=1e-5)
        mean = trained_on.statistics.observation_mean
        np.testing.assert_allclose(agent.model.observation_mean, mean, rtol=1e-6)
    recorder = Recorder(lambda *now: now == ("evaluation", 50))
    stopped = train(tiny_dataset, tmp_path / "stopped", recorder, **options)
    assert stopped.step == 50
    flowrl.train(resume=stopped.folder, progress_bar=False)
    assert_same_end(stopped.folder, tmp_path / "run")


def test_trackers_receive_every_figure(reference, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import trackio
    import wandb
    from trackio.sqlite_storage import SQLiteStorage

    tracked = wandb.init(mode="offline", project="flowrl", dir=tmp_path)
    other = trackio.init("flowrl", name="run", embed=False, auto_log_cpu=False)
    train(tiny_dataset, tmp_path / "run", flowrl.TrackerCallback(tracked), flowrl.TrackerCallback(other))
    other.finish()
    training, evaluations = (figures(reference, kind) for kind in ("train", "evaluation"))
    assert tracked.config["embed_dim"] == 8
    assert tracked.step == 60
    tracked.log({}, step=61)  # those of step 60 are whole
    last = {f"train/{name}": value for name, value in training[-1].items() if name != "kind"}
    for number, line in enumerate(evaluations[-2:], start=1):
        last |= {f"evaluation/target{number}/{name}": value for name, value in line.items()}
    shown = {name: tracked.summary[name] for name in last if name in tracked.summary.keys()}  # noqa: SIM118
    tracked.finish()
    assert {"train/loss", "evaluation/target2/return_mean"} <= shown.keys()
    assert shown == {name: pytest.approx(last[name]) for name in shown}

    assert next(iter(trackio.Api().runs("flowrl"))).config["embed_dim"] == 8
    lines = SQLiteStorage.get_logs("flowrl", "run")
    for name in ("loss", "learning_rate"):
        shown = [(line["step"], line[f"train/{name}"]) for line in lines if "train/loss" in line]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in training]
    name = "evaluation/target2/return_mean"
    shown = {line["step"]: line[name] for line in lines if name in line}
    assert list(shown.values()) == pytest.approx([line["return_mean"] for line in evaluations[1::2]])
