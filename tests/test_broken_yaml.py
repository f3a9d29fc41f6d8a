"""Presets and run configurations with every option given every wrong value, and YAML that is no preset."""

from dataclasses import fields

import pytest
from broken_inputs import MARKER, PICKLES, refusal

from flowrl.training.config import TrainConfig, parse_train_config, read_options

OPTIONS = sorted({field.name for field in fields(TrainConfig)} - {"resume"})
# Of the wrong type for every option.
WRONG = (
    *("{a: 1}", "[[1]]", "[{}]", "!!binary aGVsbG8=", "2024-01-01", "2024-01-01 10:00:00", "!!set {a}"),
    *("!!python/name:os.mkdir", "!!int x", "&a [*a]"),
)
NO_NUMBERS = ("x", "true", "''", "1 2", "[1, 2]", "1:x", "0x")
NUMBERS = (
    *("batch_size", "checkpoint_every", "dropout", "embed_dim", "eval_episodes", "eval_every"),
    *("gradient_clip", "keep_checkpoints", "learning_rate", "log_every", "num_heads", "num_layers"),
    *("return_scale", "seed", "steps", "warmup_steps", "weight_decay", "context_length"),
    *("ema_decay", "q_weight", "source_clamp"),
)
NO_SENSE = ("-1", "1e999", "-.inf", ".nan", "9" * 400)


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "preset.yaml"


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_the_wrong_type_is_refused_by_name(preset, option):
    for value in (*WRONG, *(NO_NUMBERS if option in NUMBERS else ())):
        preset.write_text(f"{option}: {value}\n")
        refusal(lambda: read_options(preset), str(preset), f"{option}|not plain YAML")
    assert list(preset.parent.iterdir()) == [preset]


@pytest.mark.parametrize("option", NUMBERS)
def test_numbers_that_make_no_sense_are_refused(preset, option):
    for value in NO_SENSE:
        preset.write_text(f"{option}: {value}\n")
        refusal(lambda: read_options(preset), option)
    flag = f"--{option.replace('_', '-')}"
    assert flag in refusal(lambda: parse_train_config(["--env", "hopper-medium", f"{flag}=-1"]))


DOCUMENTS = (
    *(b"", b"\0", b"\xff\xfe\x00", b"\xef\xbb\xbf", b"---\n...\n", b"- steps", b"5", b"null", b"'"),
    *(b"%YAML 9.9\n---\n", b"steps: [", b"steps: {", b"steps: 1\n---\nsteps: 2", b"\tsteps: 1", b"@"),
    *(b"steps: 1\n seed: 2", b"a: b: c", b"? [a]\n: 1", b"? {a: 1}\n: 1", b"? |\n  a\n: 1", b"*a", b"&a : 1"),
    *(b"!!omap [steps: 5]", b"!!set {steps}", b"[" * 5_000, b"{a: " * 5_000, b"a: &a [1]\nb: [*a, *a]"),
    *(b"steps: " + b"9" * 5000, b"5: 5", b"~: 1", b".nan: 1", b"!!python/module:os"),
    *(b"!!python/object/apply:os.mkdir [exploded]", b"!!python/object/new:os.mkdir {}"),
    *PICKLES,
)


@pytest.mark.parametrize("index", range(len(DOCUMENTS)))
def test_what_is_no_mapping_of_options_is_refused(preset, index):
    preset.write_bytes(DOCUMENTS[index])
    assert str(preset) in refusal(lambda: read_options(preset))
    (preset.parent / "config.yaml").write_bytes(DOCUMENTS[index])
    assert "config.yaml" in refusal(lambda: parse_train_config(["--resume", str(preset.parent)]))
    assert not (preset.parent / MARKER).exists()
