"""Agents to and from others: folders of their own, the Hugging Face Hub, and exported steps."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from conftest import serving
from fake_hub import COMMIT, TOKEN, FakeHub
from processes import REPOSITORY, Command, finish
from test_loading import make_agent, play
from tiny_training import figures, train_here

from flowrl import load_agent
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import episode_seeds, evaluate
from flowrl.model import Agent, AgentConfig, BehaviorCloningConfig, BehaviorCloningModel
from flowrl.model.checkpoint import load_checkpoint
from flowrl.sharing.export import ExportConfig, export_agent, run_export
from flowrl.sharing.push import PushConfig, push, refuse_paths


def test_a_saved_agent_acts_as_before_and_nothing_is_overwritten(tmp_path):
    agent = make_agent()
    expected = play(agent)
    agent.to("cpu").save(tmp_path / "agent")
    np.testing.assert_array_equal(play(load_agent(tmp_path / "agent")), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent"]
    with pytest.raises(UserError, match="agent: already there"):
        agent.save(tmp_path / "agent")
    with pytest.raises(UserError, match="already there"):
        agent.save(Path())
    with pytest.raises(UserError, match="without the training state"):
        load_checkpoint(tmp_path / "agent", for_training=True)


def run_onnx(path, inputs):
    """Act with onnxruntime alone, on the observations, returns-to-go and restarts of each timestep."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["flowrl"])
    batch = len(inputs[0][0])
    shapes = {"previous_actions": (3,), **about["state_shapes"]}
    state = {name: np.zeros((batch, *shape), np.float32) for name, shape in shapes.items()}
    state["timesteps"] = np.zeros(batch, np.int64)
    actions = []
    for observations, returns_to_go, restarts in inputs:
        state["timesteps"] = np.where(restarts, 0, state["timesteps"])
        feed = {"observations": observations, "returns_to_go": returns_to_go, **state}
        outputs = session.run(about["outputs"], feed)
        actions.append(outputs[0])
        state = dict(zip(about["inputs"][2:], outputs[1:], strict=True))
    return np.stack(actions)


def test_an_exported_onnx_step_acts_as_the_agent_for_1000_timesteps(run, exported):
    agent, batch, timesteps = load_agent(run, acting="recurrent"), 3, 1000
    random = np.random.default_rng(0)
    observations = random.normal(size=(timesteps, batch, 11)).astype(np.float32)
    rewards = random.normal(size=(timesteps, batch)).astype(np.float32)
    restarts = np.zeros((timesteps, batch), dtype=bool)
    restarts[400, 1] = restarts[401, 1] = restarts[900, 2] = True
    targets = np.array([30.0, 5.0, 12.0], dtype=np.float32)

    agent.reset(batch, targets)
    expected, returns_to_go, current = [], [], targets.copy()
    for timestep in range(timesteps):
        agent.restart(restarts[timestep])
        current = np.where(restarts[timestep], targets, current - rewards[timestep] * (timestep > 0))
        returns_to_go.append(current.astype(np.float32))
        expected.append(agent.act(observations[timestep], rewards[timestep]))

    inputs = list(zip(observations, returns_to_go, restarts, strict=True))
    np.testing.assert_allclose(run_onnx(exported, inputs), np.stack(expected), atol=1e-4)
    unrestarted = run_onnx(exported, [(*given, np.zeros(batch, bool)) for *given, _ in inputs])
    assert np.abs(unrestarted - expected)[450:850, 1].max() > 1e-2  # long after it the restart matters


@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_the_example_acts_a_whole_episode_as_evaluation_does(run, exported, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "examples")
    from act_with_onnx import act

    path, step = str(tmp_path / "step.onnx"), onnx.load(exported)
    (about,) = step.metadata_props
    for conditioning in ("return-to-go", "target"):
        about.value = about.value.replace('"return-to-go"', f'"{conditioning}"')
        onnx.save(step, path)
        agent = load_agent(run, acting="recurrent", conditioning=conditioning)
        results = evaluate(agent, agent.environment, agent.config.targets[:1], 2, 0, None)
        earned = [act(path, int(seed)) for seed in episode_seeds(0, 2)]
        np.testing.assert_allclose(earned, results[0].returns, rtol=1e-4)
    for metadata in ({"flowrl": json.dumps({"format_version": 2})}, {"other": "{}"}):
        del step.metadata_props[:]
        onnx.helper.set_model_props(step, metadata)
        onnx.save(step, path)
        with pytest.raises(SystemExit, match=r"step.onnx: not a step that flowrl exported in format 1"):
            act(path)


def test_an_exported_torch_archive_takes_any_batch(tmp_path, capsys):
    agent = make_agent("fused", full_episodes=False)
    agent.save(tmp_path / "run")
    run_export(ExportConfig(str(tmp_path / "run"), tmp_path / "step.pt2"))
    note, result = capsys.readouterr().out.splitlines()
    assert note.startswith("note: this agent acts by windows; the file carries the whole episode")
    assert "actions differ from the agent's by at most" in result
    files = {"flowrl.json": ""}
    step = torch.export.load(tmp_path / "step.pt2", extra_files=files).module()
    about = json.loads(files["flowrl.json"])
    assert about["targets"] == list(agent.config.targets)
    for batch in (1, 5):
        observations = torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch))
        state = [torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 2)]
        state += [torch.zeros(batch, *shape) for shape in about["state_shapes"].values()]
        actions, *_ = step(observations, torch.full((batch,), 30.0), *state)
        agent.reset(batch, 30.0)
        np.testing.assert_allclose(actions.numpy(), agent.act(observations.numpy()), atol=1e-5)


def test_a_step_that_differs_from_the_agent_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("flowrl.sharing.export.TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differ from the agent's"):
        export_agent(small_perceptron(), tmp_path / "step.pt2")
    assert list(tmp_path.iterdir()) == []


def small_perceptron():
    config = BehaviorCloningConfig(observation_dim=4, action_dim=2, max_timesteps=30, embed_dim=8)
    about = AgentConfig(config, context_length=1, full_episodes=False, targets=(1.0,))
    return Agent(BehaviorCloningModel(config), about)


@pytest.mark.parametrize(
    ("attention", "name", "message"),
    [
        ("softmax", "step.onnx", "softmax attention cannot be exported: its state grows"),
        ("flow", "step.txt", r"--out .*step.txt: expected a name that ends in .pt2 or .onnx"),
    ],
)
def test_what_cannot_be_exported_is_refused(attention, name, message, tmp_path):
    make_agent(attention=attention).save(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        run_export(ExportConfig(str(tmp_path / "run"), tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        train_here(tiny_dataset, folder, convolution_width=3, learning_rate=0.01)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """The step of the run's agent, which takes most of a minute to export."""
    path = run.with_name("step.onnx")
    export_agent(load_agent(run, acting="recurrent"), path)
    return path


@pytest.fixture
def hub():
    server = FakeHub()
    with serving(server):
        yield server


def commands(hub_url, cache, lines, **environment):
    """Run flowrl's commands in one process that reaches no other hub; exit code and output of each."""
    variables = {"HF_ENDPOINT": hub_url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    variables |= environment
    program = f"""
import contextlib, io, json, os, sys
from flowrl.__main__ import main
for name in [name for name in os.environ if "proxy" in name.lower()]:
    del os.environ[name]
os.environ.update({variables!r})
results = []
for line in {lines!r}:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(line)
        except SystemExit as end:
            code = end.code
    results.append((code, output.getvalue()))
print(json.dumps(results))
sys.exit()
"""
    code, output, errors = finish(Command([], program))
    assert code == 0, errors
    return json.loads(output.splitlines()[-1])


def test_push_and_pull_by_way_of_a_hub_and_then_without_a_network(run, hub, tmp_path):
    sent, pulled, pinned, evaluated = commands(
        hub.url,
        tmp_path / "cache",
        [
            ["push", str(run), "me/walker"],
            ["pull", "me/walker", str(tmp_path / "pulled")],
            ["pull", f"me/walker@{COMMIT}", str(tmp_path / "pinned")],
            ["evaluate", "hf:me/walker", "--episodes", "1"],
        ],
    )
    assert sent == [0, f"sent to {hub.url}/me/walker/commit/{COMMIT}\n"]
    assert pulled[0] == pinned[0] == 0, (pulled, pinned)
    assert evaluated[0] == 0
    assert "Hopper-v4" in evaluated[1]
    assert set(hub.files["me/walker"]) == {
        "README.md", "agent.json", "learning-curve.png", "manifest.json", "model.safetensors"
    }  # fmt: skip
    assert set(hub.downloaded) == {"agent.json", "manifest.json", "model.safetensors"}
    expected = load_agent(run)
    for name in ("pulled", "pinned"):
        agent = load_agent(tmp_path / name)
        assert agent.config == expected.config
        torch.testing.assert_close(agent.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    lines = [["pull", f"me/{name}", str(tmp_path / f"cached-{name}")] for name in ("walker", "other")]
    lines.append(["push", str(run), "me/walker"])
    cached, missing, refused = commands("http://127.0.0.1:9", tmp_path / "cache", lines)
    assert cached[0] == 0, cached
    assert missing == [2, "error: hf:me/other: the Hub cannot be reached, and it was not downloaded before\n"]
    assert refused[0] == 2
    assert refused[1].startswith("error: me/walker: the Hub cannot be reached")


def test_what_the_hub_lacks_or_refuses_is_one_line(run, hub, tmp_path):
    hub.files["me/empty"] = {"README.md": b"nothing"}
    hub.files["me/huge"] = {name: b"{}" for name in ("agent.json", "manifest.json", "model.safetensors")}
    hub.claimed_sizes["model.safetensors"] = 1 << 40
    lines = {
        "hf:me/nothing: no such repository": ["evaluate", "hf:me/nothing"],
        "hf:me/empty@v9: the repository has no revision 'v9'": ["evaluate", "hf:me/empty@v9"],
        "hf:me/empty: not an agent of flowrl, it has no agent.json": ["evaluate", "hf:me/empty"],
        f"hf:me/huge: model.safetensors has {1 << 40} bytes": ["evaluate", "hf:me/huge"],
        "hf:a b: expected hf:OWNER/NAME": ["evaluate", "hf:a b"],
        "me/: expected OWNER/NAME": ["push", str(run), "me/"],
        "me/walker: the Hub refused: ": ["push", str(run), "me/walker"],
    }
    results = commands(hub.url, tmp_path, list(lines.values()), HF_TOKEN="wrong")
    for message, (code, output) in zip(lines, results, strict=True):
        assert code == 2, output
        assert output.startswith(f"error: {message}"), (message, output)
        assert output.count("\n") == 1
    assert hub.downloaded == []


def test_a_download_that_breaks_off_is_one_line(monkeypatch):
    def broken(*_, **options):
        raise RuntimeError("peer closed connection")

    monkeypatch.setattr("huggingface_hub.HfApi.get_paths_info", broken)
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(UserError, match=r"^hf:me/x: could not be downloaded: peer closed connection$"):
        load_agent("hf:me/x")


@pytest.mark.parametrize("path", ["/home/me/a.xml", "~/a.xml", {"xml": "/home/me/a.xml"}, ["b", "../a.xml"]])
def test_a_path_of_this_machine_is_refused(path):
    with pytest.raises(UserError, match=r"option 'model' has a path of this machine, .*a\.xml"):
        refuse_paths(EnvironmentSpec("Hopper-v5", {"model": path}))
    refuse_paths(EnvironmentSpec("Hopper-v5", {"model": "a/b.xml", "other": 3}))


def test_a_dataset_is_pushed_and_minari_downloads_the_same(hub, tmp_path):
    def collect(name, *words):
        recipe = ["collect", "hopper", "--policies", "medium", "--steps", "300"]
        return [*recipe, "--id", f"mine/hopper/{name}", "--push", "me", *words]

    first, same, second = commands(
        hub.url,
        tmp_path / "cache",
        [collect("one-v0"), collect("one-v0"), collect("two-v1", "--seed", "4")],
        MINARI_DATASETS_PATH=str(tmp_path / "here"),
    )
    for code, output in (first, same, second):
        assert code == 0, output
        assert output.endswith(f"sent to {hub.url}/me/mine/commit/{COMMIT}\n")
    places = [f"hopper/{name}" for name in ("one-v0", "two-v1")]
    files = {f"{place}/{file}" for place in places for file in
             ("README.md", "data/main_data.hdf5", "data/metadata.json")}  # fmt: skip
    namespaces = {"namespace_metadata.json", "hopper/namespace_metadata.json"}
    assert set(hub.files["me/mine"]) == files | namespaces | {"README.md"}
    for place in places:  # the page of the repository names both
        assert f"]({place}/README.md)".encode() in hub.files["me/mine"]["README.md"]
    for content in hub.files["me/mine"].values():
        assert str(tmp_path).encode() not in content

    (code, output), (missing, message) = commands(
        hub.url,
        tmp_path / "other-cache",
        [["info", f"minari:mine/hopper/{name}"] for name in ("two-v1", "three-v0")],
        MINARI_DATASETS_PATH=str(tmp_path / "there"),
        MINARI_REMOTE="hf://me",
    )
    assert code == 0, output
    sha256 = second[1].splitlines()[0].rpartition(" ")[2]
    assert f"SHA-256      {sha256}\n" in output
    card = hub.files["me/mine"]["hopper/two-v1/README.md"].decode()
    assert sha256 in card
    assert "| medium | 1 | 0 | " in card
    assert missing == 2, message


def test_a_dataset_that_cannot_be_pushed_is_one_line(hub, tmp_path):
    """Said before it is collected, where the command is wrong; a list of others is never overwritten."""
    hub.files["me/mine"] = {"namespace_metadata.json": b"[]"}
    words = ["collect", "hopper", "--policies", "medium", "--steps", "300", "--push"]
    dry = ["--id", "mine/mixed-v0", "--dry-run", str(tmp_path / "dry")]
    lines = {
        "--id mixed-v0: its first part names the repository": [*words, "me", "--id", "mixed-v0"],
        "--push me/mine: expected a user": [*words, "me/mine", "--id", "mine/mixed-v0"],
        "--push sends Minari datasets": [*words, "me", "--format", "d4rl", "--out", str(tmp_path / "a.hdf5")],
        "--dry-run goes with --push": [*words[:-1], *dry],
        f"--dry-run {tmp_path}: already there": [*words, "me", *dry[:-1], str(tmp_path)],
        "me/mine: its namespace_metadata.json is not a JSON object": [*words, "me", "--id", "mine/other-v0"],
        "me/theirs: the Hub refused: ": [*words, "me", "--id", "theirs/other-v0"],
    }
    places = {"MINARI_DATASETS_PATH": str(tmp_path / "here"), "HF_TOKEN": "wrong"}
    results = commands(hub.url, tmp_path, list(lines.values()), **places)
    for message, (code, output) in zip(lines, results, strict=True):
        assert code == 2, output
        assert output.splitlines()[-1].startswith(f"error: {message}"), output
        assert output.count("\n") == 1 or message.startswith(("me/mine: its", "me/theirs"))
    assert hub.files == {"me/mine": {"namespace_metadata.json": b"[]"}}
    here = tmp_path / "here"
    folders = {path.relative_to(here) for path in here.glob("*/*") if path.is_dir()}
    assert folders == {Path("mine/other-v0"), Path("theirs/other-v0")}


def test_the_folder_of_a_dry_run_has_a_card_and_nothing_of_this_machine(run, tmp_path, capsys):
    folder = tmp_path / "folder"
    push(PushConfig(run, "me/walker", dry_run=folder))
    assert "nothing was sent" in capsys.readouterr().out
    header, body = (folder / "README.md").read_text().removeprefix("---\n").split("\n---", 1)
    results = yaml.safe_load(header)["model-index"][0]["results"]
    final = [line for line in figures(run, "evaluation") if line["step"] == 60]
    for result, line in zip(results, final, strict=True):
        values = {metric["type"]: metric["value"] for metric in result["metrics"]}
        assert values["mean_reward"] == f"{line['return_mean']:.1f} ± {line['return_std']:.1f}"
    config = load_agent(folder).config
    for fact in (config.dataset_id, config.dataset_sha256, "Hopper-v4", "60 updates", "hf:me/walker"):
        assert fact in body
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(run).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("env_id", "line"),
    [
        ("Hopper-v4", "`Hopper-v4`, at most 1000 timesteps\n"),
        ("flowrl/TMaze-v0", "`flowrl/TMaze-v0`\n"),
        (None, "an unnamed environment\n"),
    ],
)
def test_a_card_gives_the_registered_time_limit_if_there_is_one(env_id, line, tmp_path):
    agent = small_perceptron()
    agent.config = replace(agent.config, environment=env_id and EnvironmentSpec(env_id))
    agent.save(tmp_path / "agent")
    push(PushConfig(tmp_path / "agent", "me/x", dry_run=tmp_path / "folder"))
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"- Environment: {line}" in card
    assert ("make_env" in card) == bool(env_id)


def test_a_run_with_damaged_figures_is_not_pushed(run, tmp_path):
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    lines = (damaged / "metrics.jsonl").read_text().splitlines(keepends=True)
    line = '{"kind": "evaluation", "step": 1, "target_return": 1, "return_mean": 1}\n'  # no episodes
    (damaged / "metrics.jsonl").write_text("".join([lines[0], line, *lines[1:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is not a line of metrics"):
        push(PushConfig(damaged, "me/walker", dry_run=tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()
