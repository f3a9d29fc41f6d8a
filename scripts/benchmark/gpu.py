"""What is measured on a CUDA device: whole updates, and attention in bfloat16 against flash attention.

Updates go through the trainer's CUDA graph, attention is called eagerly: the launches of its kernels count.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from attention import Inputs, forward_backward, make_inputs
from tables import Goal, Measurement, Row, Section
from timing import Spread, interleaved
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import Sizes, open_trainer, paper_config, training_data

from flowrl.attention.flow import triton
from flowrl.attention.kinds import AttentionName

ATTENTIONS: tuple[AttentionName, ...] = ("flow", "softmax")
LENGTH_GOALS = {3_072: 1.0, 12_288: 4.0}  # times as fast as flash attention
BATCH, HEADS, HEAD_DIM = 16, 4, 64
# Tensors of the inputs' size that forward and backward must move: q, k, v in and the output out, then
# these three and the output's gradient in and three gradients out.
TENSORS_MOVED = 4 + 7
COPIED_BYTES = 1 << 30
WARM_UPS = 8  # updates before the clock runs: the trainer records its graph during the first few
RUN_UPDATES, RUN_MINUTES = 100_000, 6.0  # a whole training, its five evaluations included


def measure_gpu(sizes: Sizes, repetitions: int) -> Section:
    """Skipped, with the reason in its row, without a CUDA device."""
    section = Section("gpu")
    if not torch.cuda.is_available():
        reason = "no CUDA device"
        section.rows.append(Row("training updates and attention on a GPU", "", "x", None, None, reason))
        return section
    _measure_updates(section, sizes, repetitions)
    _measure_attention(section, sizes, repetitions)
    return section


def _measure_updates(section: Section, sizes: Sizes, repetitions: int) -> None:
    for full_episodes, goal in ((False, Goal(1.5, at_least=False)), (True, None)):
        with ExitStack() as stack:
            contenders: dict[str, Callable[[], None]] = {}
            for attention in ATTENTIONS:
                config = paper_config(sizes, attention, full_episodes=full_episodes)
                trainer = stack.enter_context(open_trainer(config, training_data(sizes, config), "cuda"))
                for _ in range(WARM_UPS):
                    trainer.update()
                contenders[attention] = trainer.update
            timings = interleaved(contenders, repetitions, wait=torch.cuda.synchronize)
        windows = trainer.state.sampler.batch_size
        timesteps = sizes.episode_length if full_episodes else 20
        case = f"GPU update, {windows} x {timesteps:,} timesteps"
        for form, timing in timings.items():
            section.measurements.append(Measurement(form, case, windows * timesteps, timing))
        section.rows.append(Row(case, "time", "ms", timings["flow"].scaled(1e3), goal))
        faster = timings["softmax"].ratio_to(timings["flow"])
        section.rows.append(Row(case, "the same model with softmax", "x", faster))
        if not full_episodes:
            minutes = timings["flow"].scaled(RUN_UPDATES / 60).median
            section.notes.append(
                f"{RUN_UPDATES:,} such updates take {minutes:.1f} minutes; the goal for a run on "
                f"hopper-medium with five evaluations is {RUN_MINUTES:g}."
            )


def _measure_attention(section: Section, sizes: Sizes, repetitions: int) -> None:
    bandwidth = _copy_bandwidth(repetitions)
    for length, goal in LENGTH_GOALS.items():
        if length not in sizes.lengths:
            continue
        shape = (BATCH, HEADS, length, HEAD_DIM)
        inputs = make_inputs(shape, "cuda", torch.bfloat16)
        contenders = {"flow": partial(forward_backward, "flow", inputs), "softmax": partial(_flash, inputs)}
        for call in contenders.values():  # kernels are compiled before anything is timed
            call()
        torch.cuda.synchronize()
        timings = interleaved(contenders, repetitions, wait=torch.cuda.synchronize)
        kernels = "" if triton.supports(*inputs) else ", without Triton"
        case = f"GPU attention forward + backward{kernels}, bf16, {BATCH} x {HEADS} x {length:,} x {HEAD_DIM}"
        for form, timing in timings.items():
            section.measurements.append(Measurement(form, case, BATCH * length, timing))
        faster = timings["softmax"].ratio_to(timings["flow"])
        section.rows.append(Row(case, "flash attention", "x", faster, Goal(goal)))
        moved = TENSORS_MOVED * inputs[0].numel() * inputs[0].element_size()
        seconds = timings["flow"]
        share = 100 * moved / bandwidth
        part = Spread(share / seconds.median, share / seconds.high, share / seconds.low)
        section.rows.append(Row(case, "bandwidth bound of its bytes", "%", part, Goal(50.0)))


def _flash(inputs: Inputs) -> None:
    """Softmax by flash attention and nothing else."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        forward_backward("softmax", inputs)


def _copy_bandwidth(repetitions: int) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = interleaved({"copy": partial(target.copy_, source)}, repetitions, wait=torch.cuda.synchronize)[
        "copy"
    ]
    return 2 * COPIED_BYTES / timing.median
