"""Pictures of a benchmark run: attention over length, updates, rollouts."""

from pathlib import Path
from typing import TYPE_CHECKING

from tables import Measurement, Section

from flowrl.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"flow": "tab:blue", "flow, bfloat16": "tab:cyan", "softmax": "tab:orange", "authors": "tab:red"}


def draw_report(path: Path, sections: list[Section]) -> bool:
    """Write ``path`` with .png added to its name; return False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # an extra: only drawing needs it
    except ImportError:
        return False
    measurements = {section.name: section.measurements for section in sections}
    figure = Figure(figsize=(11, 7), layout="constrained")
    (time_axes, memory_axes), (update_axes, rollout_axes) = figure.subplots(2, 2)
    lengths = [m for m in measurements.get("attention", []) if m.case.startswith("1 x ")]
    _draw_lengths(time_axes, memory_axes, lengths)
    _draw_bars(update_axes, [m for m in measurements.get("update", []) if m.contender in COLORS], "timesteps")
    rollouts = [m for m in measurements.get("rollouts", []) if m.case == "Hopper episodes"]
    _draw_bars(rollout_axes, rollouts, "environment steps")
    update_axes.set_title("training, paper size")
    rollout_axes.set_title("evaluation in Hopper")
    with atomic_path(path.with_name(path.name + ".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _draw_lengths(time_axes: "Axes", memory_axes: "Axes", measurements: list[Measurement]) -> None:
    for form, color in COLORS.items():
        of_form = [m for m in measurements if m.contender == form]
        times = [(m.size, m.seconds.median) for m in of_form]
        # tiny inputs add no page to the process: nothing that a logarithmic axis could show
        memory = [(m.size, m.peak_memory_bytes / 2**20) for m in of_form if m.peak_memory_bytes]
        for axes, points in ((time_axes, times), (memory_axes, memory)):
            if points:
                axes.loglog(*zip(*points, strict=True), "o-", color=color, label=form)
    time_axes.set(ylabel="seconds", title="attention, forward + backward")
    memory_axes.set(ylabel="peak memory, MiB", title="attention, forward + backward")
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="tokens")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()


def _draw_bars(axes: "Axes", measurements: list[Measurement], unit: str) -> None:
    """Rates as horizontal bars with their quartiles, the first measurement on top."""
    upwards = measurements[::-1]
    names = [f"{m.contender}\n{m.case.removeprefix('update, ').split(',')[0]}" for m in upwards]
    rates = [m.size / m.seconds.median for m in upwards]
    errors = [
        [rate - m.size / m.seconds.high for rate, m in zip(rates, upwards, strict=True)],
        [m.size / m.seconds.low - rate for rate, m in zip(rates, upwards, strict=True)],
    ]
    colors = [COLORS.get(m.contender, "tab:green") for m in upwards]
    axes.barh(names, rates, xerr=errors if upwards else None, color=colors, capsize=3)
    axes.set(xlabel=f"{unit} per second")
    axes.grid(alpha=0.3, axis="x")
