"""Whole training updates: sampling, forward, backward, clipping and optimiser, as the trainer does them."""

from contextlib import ExitStack
from dataclasses import replace

from attention import authors_flow_attention
from tables import Goal, Measurement, Row, Section
from timing import interleaved, peak_memory
from torch import nn
from workload import Sizes, open_trainer, paper_config, training_data

from flowrl.attention.kinds import AttentionName, attention_kind
from flowrl.model.transformer import SelfAttention
from flowrl.training.config import TrainConfig

BFLOAT16 = "flow, bfloat16"
AUTHORS = replace(attention_kind("flow"), parallel=authors_flow_attention)
TINY = Sizes(
    num_layers=1, embed_dim=8, batch_size=1, episode_batch_size=1, episode_length=30, transitions=400
)


def use_authors_attention(model: nn.Module) -> None:
    """Let the model attend as the authors' code does; its weights and its function stay the same."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.kind = AUTHORS


def measure_update(sizes: Sizes, repetitions: int) -> Section:
    """Windows of 20 timesteps with all three attentions, full episodes with flow and softmax."""
    section = Section("update")
    _measure_case(section, sizes, repetitions, full_episodes=False)
    _measure_case(section, sizes, repetitions, full_episodes=True)
    return section


def update_once(sizes: Sizes, form: str, full_episodes: bool) -> None:
    """Two updates, the second with the optimiser's state: what a process is measured on."""
    config = _config(sizes, form, full_episodes=full_episodes)
    with open_trainer(config, training_data(sizes, config)) as trainer:
        if form == "authors":
            use_authors_attention(trainer.state.model)
        for _ in range(2):
            trainer.update()


def _measure_case(section: Section, sizes: Sizes, repetitions: int, *, full_episodes: bool) -> None:
    forms = ("flow", BFLOAT16, "softmax") if full_episodes else ("flow", BFLOAT16, "softmax", "authors")
    timesteps = sizes.episode_length if full_episodes else 20
    batch_size = sizes.episode_batch_size if full_episodes else sizes.batch_size
    case = f"{batch_size} x {timesteps:,} timesteps, {3 * timesteps:,} tokens"
    with ExitStack() as stack:
        trainers = {}
        for form in forms:
            config = _config(sizes, form, full_episodes=full_episodes)
            dataset = training_data(sizes, config)
            trainers[form] = stack.enter_context(open_trainer(config, dataset))
        if "authors" in trainers:
            use_authors_attention(trainers["authors"].state.model)
        timings = interleaved({form: trainer.update for form, trainer in trainers.items()}, repetitions)
    for form in forms:
        memory = peak_memory(update_once, sizes, form, full_episodes, warm_up=(TINY, form, full_episodes))
        size = batch_size * timesteps
        section.measurements.append(Measurement(form, f"update, {case}", size, timings[form], memory))

    what = f"training update, {case}"
    softmax_goal = 2.5 if full_episodes else 1.0
    against_softmax = timings["softmax"].ratio_to(timings["flow"])
    section.rows.append(Row(what, "the same model with softmax", "x", against_softmax, Goal(softmax_goal)))
    if "authors" in timings:
        against_authors = timings["authors"].ratio_to(timings["flow"])
        section.rows.append(Row(what, "the same with the authors' form", "x", against_authors, Goal(20.0)))
    against_float32 = timings["flow"].ratio_to(timings[BFLOAT16])
    section.rows.append(Row(f"{what}: in bfloat16", "in float32", "x", against_float32))


def _config(sizes: Sizes, form: str, *, full_episodes: bool) -> TrainConfig:
    attention: AttentionName = "softmax" if form == "softmax" else "flow"
    config = paper_config(sizes, attention, full_episodes=full_episodes)
    return replace(config, precision="bfloat16" if form == BFLOAT16 else "float32")
