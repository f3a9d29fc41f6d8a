"""Presets, flags and resumed runs: what wins, what is refused, and how it is said."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from broken_inputs import refusal
from tiny_training import train_here

from flowrl.data.d4rl import D4RL_ENVIRONMENTS
from flowrl.errors import UserError
from flowrl.training.config import (
    RESUMABLE,
    TrainConfig,
    check_resumable,
    check_values,
    parse_train_config,
    read_options,
    to_arguments,
    to_yaml,
)
from flowrl.training.presets import preset_options
from flowrl.training.setup import build_agent, load_dataset


def write_run(folder, **options):
    """A folder that looks like a run trained with these options."""
    folder.mkdir()
    config = TrainConfig(**{"env": "hopper-medium", "run_dir": folder, "warmup_steps": 10, **options})
    (folder / "config.yaml").write_text(to_yaml(config))
    return config


def test_flags_win_over_the_preset_and_the_preset_over_defaults(tmp_path):
    preset = tmp_path / "mine.yaml"
    text = "env: hopper-medium\ntargets: [10, 2e+1]\nlearning_rate: 2E-4\nembed_dim: 64\ncompile: true\n"
    preset.write_text(text)
    config = parse_train_config(["--config", str(preset)])
    assert config == TrainConfig(
        env="hopper-medium",
        targets=(10.0, 20.0),
        learning_rate=2e-4,
        embed_dim=64,
        compile=True,
        config=str(preset),
    )
    assert isinstance(config.learning_rate, float)  # YAML 1.1 takes 2E-4 for a string
    flags = ["--targets", "-5", "--learning-rate", "3e-4", "--no-compile", "--env", "walker2d-medium"]
    for arguments in (["--config", str(preset), *flags], [*flags, "--config", str(preset)]):
        changes = {"targets": (-5.0,), "learning_rate": 3e-4, "compile": False, "env": "walker2d-medium"}
        assert parse_train_config(arguments) == replace(config, **changes)


TARGETS = {"hopper": (3600.0, 1800.0), "halfcheetah": (12000.0, 6000.0), "walker2d": (5000.0, 2500.0)}
SHAPES = {"-paper": (20, "interleaved", 64), "-fused": (20, "fused", 64), "-long": ("episode", "fused", 4)}


@pytest.mark.parametrize(
    ("robot", "data", "recipe"),
    [
        ("hopper", "medium", "-paper"),
        ("halfcheetah", "medium-replay", "-fused"),
        ("walker2d", "medium-expert", "-long"),
    ],
)
def test_every_preset_holds_the_figures_of_its_dataset_and_recipe(robot, data, recipe):
    env = f"{robot}-{data}"
    context, layout, batch = SHAPES[recipe]
    expected = TrainConfig(
        env=env, config=f"{env}{recipe}", targets=TARGETS[robot], return_scale=1000.0, context_length=context,
        token_layout=layout, batch_size=batch, steps=100_000, learning_rate=1e-3, weight_decay=1e-4,
    )  # fmt: skip
    assert env in D4RL_ENVIRONMENTS
    assert parse_train_config(["--config", expected.config]) == expected
    for other in ("medium", "medium-replay", "medium-expert"):
        options = preset_options(f"{robot}-{other}{recipe}", None)
        assert options == {**preset_options(expected.config, None), "env": f"{robot}-{other}"}
    name = recipe.removeprefix("-")
    with pytest.raises(UserError, match=f"this is for {env}, not walker2d-medium; give --config {name}"):
        preset_options(expected.config, "walker2d-medium")
    assert parse_train_config(["--env", env, "--config", name]) == replace(expected, config=name)
    default = TrainConfig(
        env=env, return_scale=1000.0, context_length="episode", token_layout="fused", embed_dim=128,
        timesteps_per_update=1280, steps=3000 if robot == "hopper" else 6000, conditioning="target",
        eval_every=1000, log_every=50,
    )  # fmt: skip
    assert parse_train_config(["--env", env]) == default
    assert parse_train_config(["--config", env]) == replace(default, config=env)


REFUSED = {  # more in test_broken_yaml.py
    "stepz: 5": "'stepz': unknown option; did you mean 'steps'",
    "batch-size: 5": "'batch-size': unknown option; did you mean 'batch_size'",
    "resume: runs/x": "'resume': this is for the command line alone",
    "config: paper": "'config': a preset cannot be named in a file of options",
    "steps: 1\nseed: 2\nsteps: 3": "key 'steps' is given twice",
    "steps: 1e3": "'steps' 1000.0: should be a valid integer",
    "steps: '5'": "'steps' '5': should be a valid integer",
    "steps: 0": "'steps' 0: should be greater than or equal to 1",
    "compile: 1": "'compile' 1: should be a valid boolean",
    "attention: lineal": "'attention' 'lineal': should be 'flow', 'softmax', 'linear'",
    "context_length: all": "'context_length' 'all': should be a valid integer or should be 'episode'",
    "targets: ['5', '--steps', '7']": "'targets' ['5', '--steps', '7']: should be a valid number",
    f"env: [{'a' * 100_000}, b]": "'env' ['aaa",
    "targets: &x [1]\nenv: *x": "references",
}


@pytest.mark.parametrize("text", list(REFUSED), ids=lambda text: text[:30].encode("unicode_escape").decode())
def test_yaml_that_is_wrong_is_refused_by_file_and_key(tmp_path, monkeypatch, capfd, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{re.escape(REFUSED[text])}") as caught:
        read_options(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert capfd.readouterr() == ("", "")  # the message is all there is
    assert list(tmp_path.iterdir()) == [path]


def flag(name):
    return f"--{name.replace('_', '-')}"


FROM_1 = ("context_length", "num_layers", "embed_dim", "num_heads", "steps", "batch_size")
FROM_1 += ("timesteps_per_update", "log_every", "checkpoint_every", "keep_checkpoints")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 0}, f"{flag(name)} 0: should be greater than or equal to 1") for name in FROM_1),
        *(
            ({name: 0.0}, f"{flag(name)} 0.0: should be greater than 0")
            for name in ("learning_rate", "gradient_clip", "return_scale")
        ),
        ({"top_fraction": 1.01}, "--top-fraction 1.01: should be less than or equal to 1"),
        ({"dropout": 1.0}, "--dropout 1.0: should be less than 1"),
        ({"embed_dim": 65}, "--embed-dim 65: must be a multiple of --num-heads 4"),
        ({"embed_dim": 10**30}, "--embed-dim 10+.*: should be less than"),
        ({"seed": 1 << 64}, "--seed 18446744073709551616: should be less than"),
        ({"targets": (1e39,)}, r"--targets \(1e\+39,\): should be less than or equal to 30+"),
        ({"targets": (1.0, float("nan"))}, r"--targets \(1.0, nan\): should be a finite number"),
        ({"eval_episodes": 60_000}, "--eval-episodes 60000: must be at most 50000 at each of 2 --targets"),
        ({"env": None}, "give --env .* or --dataset"),
        ({"keep_best": "return_mean", "eval_episodes": 0}, "--keep-best return_mean: there are no"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_sense_name_their_flag(options, message):
    with pytest.raises(UserError, match=message):
        check_values(TrainConfig(**{"env": "hopper-medium", **options}))


# Every field away from its default.
OTHER = TrainConfig(
    env="hopper-medium", dataset=("minari:a/b-v0", "c.hdf5"), config="x.yaml", run_dir=Path("runs/a b"),
    env_import=("a.b",), env_kwargs='{"x": [1, "y"]}', max_episode_steps=9, reference_scores=(-1.5, 2.0),
    split_at_timeouts=True, memory_map=Path("map"), mask_velocities=True, conditioning="target",
    agent="bc", top_fraction=0.25,
    attention="softmax", token_layout="fused", context_length="episode", num_layers=2, embed_dim=64,
    num_heads=2, dropout=0.0, steps=7, batch_size=3, learning_rate=1e-05, weight_decay=1e-22,
    warmup_steps=3, schedule="constant", gradient_clip=1e16, return_scale=123.456, reward_mode="delayed",
    ema_decay=0.5, seed=9, device="cpu", precision="float32", compile=True, targets=(-1.5, 1e-07),
    eval_every=0, eval_episodes=1, eval_seed=7, acting="window", log_every=2, checkpoint_every=3,
    keep_checkpoints=4, time_encoding="sinusoidal", source_clamp=20.0, timesteps_per_update=640,
    keep_best="success_rate", validation_fraction=0.1, q_weight=0.25, convolution_width=4,
)  # fmt: skip


def test_written_configuration_reads_back_the_same(tmp_path):
    default = TrainConfig(env="hopper-random")
    for field in fields(TrainConfig):
        assert field.name == "resume" or getattr(OTHER, field.name) != getattr(default, field.name)
    for config in (OTHER, default):
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config))
        assert parse_train_config(["--config", str(path)]) == replace(config, config=str(path))
        assert yaml.safe_load(path.read_text())["learning_rate"] == config.learning_rate
        words = [*to_arguments(config), *([f"--run-dir={config.run_dir}"] if config.run_dir else [])]
        assert parse_train_config(words) == replace(config, config=None)


def test_resume_takes_the_run_s_configuration(tmp_path):
    run = tmp_path / "run"
    saved = write_run(run, learning_rate=5e-4, context_length=7, targets=(5.0,), steps=100)
    assert parse_train_config(["--resume", str(run)]) == replace(saved, resume=run)
    changed = parse_train_config(["--resume", str(run), "--steps", "900", "--targets", "1", "2"])
    assert changed == replace(saved, resume=run, steps=900, targets=(1.0, 2.0))
    with pytest.raises(UserError, match=r"--run-dir x: --resume continues in .*run; copy that folder first"):
        parse_train_config(["--resume", str(run), "--run-dir", "x"])
    moved = run.rename(tmp_path / "moved")
    assert parse_train_config(["--resume", str(moved)]).resume == moved


@pytest.mark.parametrize(("saved", "resumed"), [(None, 10), (4, 4)])
def test_resume_never_lengthens_the_warm_up(tmp_path, saved, resumed):
    """Runs from before it was resolved at the start have the one of their saved number of updates."""
    write_run(tmp_path / "run", steps=100, warmup_steps=saved)
    for more in ([], ["--warmup-steps", "None"]):
        config = parse_train_config(["--resume", str(tmp_path / "run"), "--steps", "100000", *more])
        assert (config.warmup_steps, config.steps) == (resumed, 100_000)


FIXED = sorted({field.name for field in fields(TrainConfig)} - RESUMABLE)


def test_the_value_that_a_run_has_anyway_is_no_change(tmp_path):
    run = tmp_path / "run"
    saved = write_run(run)
    values = {name: value for name in FIXED if (value := getattr(saved, name)) not in (None, (), False)}
    flags = [f"{flag(name)}={value}" for name, value in values.items()]
    assert parse_train_config(["--resume", str(run), *flags]) == replace(saved, resume=run)


@pytest.mark.parametrize("name", FIXED)
def test_resume_cannot_change_what_was_computed(name):
    saved = TrainConfig(env="hopper-random")
    check_resumable(saved, replace(saved, steps=7), Path("run"))
    message = f"^{flag(name)} .*: run was trained with .*--resume cannot change it"
    with pytest.raises(UserError, match=message):
        check_resumable(saved, replace(saved, **{name: getattr(OTHER, name)}), Path("run"))


@pytest.mark.parametrize("options", [{"embed_dim": 1 << 20}, {"embed_dim": 1 << 16, "num_layers": 20}])
@pytest.mark.parametrize("agent", ["transformer", "bc"])
def test_a_model_beyond_this_machine_is_refused_before_it_is_made(tiny_dataset, tmp_path, options, agent):
    message = r"--embed-dim \d+, --num-layers \d+: .* GiB of memory"
    refusal(lambda: train_here(tiny_dataset, tmp_path / "run", agent=agent, **options), message)
    assert not (tmp_path / "run").exists()


def test_a_model_for_a_gpu_must_fit_the_gpu(tiny_dataset, monkeypatch):
    """Whatever memory the machine around it has."""
    config = TrainConfig(dataset=str(tiny_dataset), env="Hopper-v4", embed_dim=64, num_layers=5)
    dataset = load_dataset(config)
    size = 5 * 4 * sum(p.numel() for p in build_agent(config, dataset).model.parameters())
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, 1 << 50))
    build_agent(config, dataset, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size - 1, 1 << 50))
    with pytest.raises(UserError, match=r"--embed-dim 64, --num-layers 5: .*, device cuda:0"):
        build_agent(config, dataset, gpu)
