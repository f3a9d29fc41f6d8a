"""Run folders with wrong weights, configurations, states and figures: refused, even with a valid manifest."""

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_inputs import ending, refusal, reseal, with_value
from safetensors.torch import load_file, save_file
from tiny_training import train_here

import flowrl
from flowrl.__main__ import COMMANDS
from flowrl.evaluation.command import EvaluateConfig, evaluate_run
from flowrl.report.runs import load_runs
from flowrl.signals import StopSignals
from flowrl.training.config import parse_train_config
from flowrl.training.metrics import METRICS_FILE
from flowrl.training.run import run_training

STEP = "checkpoints/step-00000004"
WRONG = (None, True, -1, 1.5, 10**400, math.nan, "\ud800", [1], {"a": 1})


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    """A run of four updates with one checkpoint; not to be changed."""
    options = {"steps": 4, "checkpoint_every": 4, "log_every": 3, "keep_checkpoints": 1, "eval_episodes": 0}
    return train_here(tiny_dataset, tmp_path_factory.mktemp("whole") / "run", **options).folder


@pytest.fixture
def run(whole, tmp_path, monkeypatch):
    """A copy of the run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def config(whole):
    """What --resume reads from the run's own config.yaml; four more updates are asked for."""
    return parse_train_config(["--resume", str(whole), "--steps", "8"])


def places(data: Any, so_far: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON document that a value can be put into."""
    if so_far:
        yield so_far
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*so_far, key))


def test_every_entry_of_the_manifest_with_every_wrong_value(run):
    path = run / STEP / "manifest.json"
    data, tried, refused = json.loads(path.read_text()), 0, 0
    for place in places(data):
        for value in WRONG:
            path.write_text(json.dumps(with_value(data, place, value)))
            tried += 1
            refused += ending(lambda: flowrl.load_agent(run)) is not None
    assert tried > 100
    assert refused > 0.75 * tried  # the rest are other values of the right kind, such as another dataset_id


def tensor_damage(name: str, tensor: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    yield {}
    yield {name: tensor, f"{name}.more": tensor.clone()}
    yield {name: tensor[None]}
    yield {name: torch.cat((tensor.flatten(), tensor.flatten()))}
    yield {name: tensor.flatten()[:0]}
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        yield {name: tensor.to(dtype)}
    for value in (math.nan, math.inf):
        yield {name: torch.full_like(tensor, value)}


def test_weights_with_every_damage(run):
    path, tried = run / STEP / "model.safetensors", 0
    tensors = load_file(path)
    for name in ("blocks.1.mlp.0.weight", "observation_std", "predict_action.bias"):
        others = {other: value for other, value in tensors.items() if other != name}
        for damage in tensor_damage(name, tensors[name]):
            save_file({**others, **damage}, path)
            reseal(run / STEP)
            refusal(lambda: flowrl.load_agent(run), name, "model.safetensors")
            tried += 1
    assert tried == 30


def safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (16,), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "nothing": b"",
    "a length of 2^64 - 1": safetensors(entry(), length=(1 << 64) - 1),
    "a length of 100 MB": safetensors(entry(), length=100_000_000),
    "JSON without end": safetensors(b"[" * 100_000),
    "a tensor of exabytes": safetensors(entry(shape=(1 << 61,), offsets=(0, 1 << 63))),
    "an 8-bit type": safetensors(entry("F8_E8M0", (64,))),
    "a whole file of something else": safetensors(entry()),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_broken_safetensors_header_is_refused(run, config, case):
    for name, use in (
        ("model", lambda: flowrl.load_agent(run)),
        ("training", lambda: run_training(replace(config, resume=run), StopSignals())),
    ):
        before = (run / STEP / f"{name}.safetensors").read_bytes()
        (run / STEP / f"{name}.safetensors").write_bytes(HEADERS[case])
        reseal(run / STEP)
        assert f"{name}.safetensors" in refusal(use)
        (run / STEP / f"{name}.safetensors").write_bytes(before)


STATE = {
    "no optimiser": lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("optimizer.")},
    "no numbers": lambda tensors: {**tensors, "optimizer.x.exp_avg": torch.zeros(3)},
    "too many dots": lambda tensors: {**tensors, "optimizer.0.a.b": torch.zeros(3)},
    "a huge number": lambda tensors: {**tensors, "optimizer." + "9" * 5000 + ".x": torch.zeros(3)},
    "steps of a row": lambda tensors: {**tensors, "optimizer.0.step": torch.ones(2)},
    "averages of integers": lambda tensors: {
        **tensors, "optimizer.0.exp_avg": tensors["optimizer.0.exp_avg"].to(torch.int64)
    },
    "pending of three": lambda tensors: {**tensors, "pending": torch.ones(1, 3)},
    "pending integers": lambda tensors: {**tensors, "pending": torch.ones((1, 2), dtype=torch.int64)},
    "pending nan": lambda tensors: {**tensors, "pending": torch.full((1, 2), math.nan)},
    "a random state cut short": lambda tensors: {
        **tensors, "random.torch": torch.zeros(7, dtype=torch.uint8)
    },
    "a random state of no generator": lambda tensors: {
        **tensors, "random.sampler": torch.full((5056,), 255, dtype=torch.uint8)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", STATE)
def test_a_training_state_that_does_not_fit_is_refused(run, config, case):
    path = run / STEP / "training.safetensors"
    save_file(STATE[case](load_file(path)), path)
    reseal(run / STEP)
    assert "training.safetensors" in refusal(lambda: run_training(replace(config, resume=run), StopSignals()))


@pytest.mark.parametrize("key", ["evaluated_step", None])
def test_training_json_with_wrong_values(run, config, key):
    path = run / STEP / "training.json"
    data = json.loads(path.read_text())
    kept = sorted(file.name for file in run.iterdir())
    for value in (*WRONG, "missing"):
        if value == -1 and key == "evaluated_step":  # as before any evaluation
            continue
        changed = value if key is None else {**data, key: value}
        if key is not None and value == "missing":
            del changed[key]
        path.write_text(json.dumps(changed))
        reseal(run / STEP)
        assert "training." in refusal(lambda: run_training(replace(config, resume=run), StopSignals())), value
    assert sorted(file.name for file in run.iterdir()) == kept


LINES = {
    "text": b"loss 5",
    "nothing": b"",
    "a list": b"[]",
    "no kind": b'{"step": 1}',
    "no step": b'{"kind": "train", "loss": 1}',
    "loss of text": b'{"kind":"train","step":1,"loss":"x","updates_per_second":1,"tokens_per_second":1}',
    "step of a list": b'{"kind": "train", "step": [1], "loss": 1}',
    "evaluation of no score": b'{"kind": "evaluation", "step": 1, "target_return": 5}',
    "target of a list": b'{"kind": "evaluation", "step": 1, "target_return": [], "normalized_score_mean": 1}',
    "without end": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe\x00",
    "digits": b"9" * 10_000,
}


TAKEN = {  # by a report, and by a training that is resumed, which reads no scores
    "loss of text": (True, True),
    "evaluation of no score": (False, True),
    "target of a list": (False, True),
}


@pytest.mark.parametrize("case", LINES)
def test_a_broken_line_of_metrics_is_refused(run, config, case):
    path = run / METRICS_FILE
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join((*lines[:1], LINES[case], *lines[1:], b"")))
    readers = (lambda: load_runs((run,)), lambda: run_training(replace(config, resume=run), StopSignals()))
    for read, taken in zip(readers, TAKEN.get(case, (False, False)), strict=True):
        line = ending(read)
        assert (line is None) == taken
        assert taken or f"{METRICS_FILE}: line 2 " in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("kwargs", value) for value in ({"no_such": 1}, {"frame_skip": "x"}, {"xml_file": "/absent.xml"})),
        *(("env_id", value) for value in ("HalfCheetah-v4", "CartPole-v1")),
    ],
)
def test_an_environment_that_cannot_be_made_or_does_not_fit_is_refused(run, name, value):
    path = run / STEP / "agent.json"
    path.write_text(json.dumps(with_value(json.loads(path.read_text()), ("environment", name), value)))
    reseal(run / STEP)
    assert ("Hopper-v4" if name == "kwargs" else str(value)) in refusal(
        lambda: evaluate_run(EvaluateConfig(run, episodes=1))
    )


@pytest.mark.parametrize(
    "options",
    [
        *({"episodes": value} for value in (0, 10**12, 10**400)),
        {"max_episode_steps": 0},
        *({"targets": value} for value in ((math.nan,), (1e308, -math.inf))),
        *({"checkpoint": value} for value in (-1, 5)),
        *({"seed": value} for value in (-1, 1 << 64)),
        *({"device": value} for value in ("cuda:99", "meta", "gpu", "cpu:x", "cuda:" + "9" * 400, "", "\0")),
        *({"json": Path(value)} for value in (".", "a" * 300, "/dev/null/x")),
        *({"video": Path(value)} for value in ("x.avi", "/dev/null/x.mp4")),
        *({"run": Path(value)} for value in ("absent", "a" * 300, "/dev/null", "run/config.yaml", "\0")),
    ],
    ids=lambda options: ascii(options)[:40],
)
def test_requests_that_make_no_sense_are_refused(run, options):
    config = EvaluateConfig(**{"run": run, "episodes": 1, "targets": (30.0,), **options})
    refusal(lambda: COMMANDS["evaluate"].call(config))
