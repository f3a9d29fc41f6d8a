"""Attention alone, forward and backward: Flow-Attention against its authors' form and against softmax."""

from collections.abc import Callable
from functools import partial

import torch
from tables import Goal, Measurement, Row, Section
from timing import Spread, Timing, interleaved, peak_memory
from torch import Tensor
from workload import Sizes

from flowrl.attention.kinds import attention_kind
from flowrl.process import prepare_process

Inputs = tuple[Tensor, Tensor, Tensor]  # queries, keys, values
Shape = tuple[int, int, int, int]  # batch, heads, tokens, head_dim
LONGEST_AUTHORS = 3_072  # beyond it a (heads, length, d, d) tensor takes 0.8 GB and more, several at a time
LONGEST_SOFTMAX = 12_288  # beyond it a single call takes minutes
LONG_GOALS = {("authors", 3_072): 25.0, ("softmax", 3_072): 4.0, ("softmax", 12_288): 12.0}


def authors_flow_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, clamp: float = 10.0, eps: float = 1e-6
) -> Tensor:
    """Causal Flow-Attention the way its authors compute it: k outer v, then a cumulative sum over length.

    Takes (batch, heads, length, head_dim) tensors before the sigmoid; the (batch, heads, length, head_dim,
    value_dim) tensor in the middle is what makes it slow. Written from the formula (see
    :mod:`flowrl.attention.flow.naive`, which it equals).
    """
    q, k = queries.sigmoid(), keys.sigmoid()
    n = torch.arange(1, q.shape[-2] + 1, dtype=q.dtype, device=q.device)  # (length,)
    incoming = torch.einsum("bhld,bhld->bhl", q + eps, k.cumsum(2) + eps)
    outgoing = torch.einsum("bhld,bhld->bhl", k + eps, q.cumsum(2) + eps)
    weighted_keys = (k * (n / outgoing)[..., None]).cumsum(2)
    weighted_queries = (q * (n / incoming)[..., None]).cumsum(2)
    conserved_sink = torch.einsum("bhld,bhld->bhl", q + eps, weighted_keys + eps) / n
    conserved_source = torch.einsum("bhld,bhld->bhl", k + eps, weighted_queries + eps) / n
    exponential = conserved_source.clamp(-clamp, clamp).exp()
    competed = values * (n * exponential / exponential.cumsum(2))[..., None]
    memory = torch.einsum("bhld,bhlm->bhldm", k, competed).cumsum(2)
    aggregated = torch.einsum("bhld,bhldm->bhlm", q / incoming[..., None], memory)
    return aggregated * conserved_sink.sigmoid()[..., None]


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flow": attention_kind("flow").parallel,
    "softmax": attention_kind("softmax").parallel,
    "authors": authors_flow_attention,
}


def make_inputs(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Random queries, keys and values that want gradients."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, *shape, generator=generator).to(device, dtype)
    return tuple(tensor.detach().requires_grad_() for tensor in drawn)


def forward_backward(form: str, inputs: Inputs) -> None:
    """One call of the named form and its gradients by all three inputs."""
    outputs = FORMS[form](*inputs)
    torch.autograd.grad(outputs, inputs, torch.ones_like(outputs))


def forward_backward_of(form: str, shape: Shape) -> None:
    """The same, inputs included: what a process is measured on."""
    forward_backward(form, make_inputs(shape))


def measure_attention(sizes: Sizes, repetitions: int) -> Section:
    """Windows, then lengths that grow; the forms that a length is too long for are skipped there."""
    section = Section("attention")
    prepare_process()  # as training does
    times = _measure_shape(section, sizes.windows, tuple(FORMS), repetitions)
    what = f"attention forward + backward, {_case(sizes.windows)}"
    section.rows.append(_faster(what, "authors' form", times["authors"], times["flow"], 100.0))
    section.rows.append(_faster(what, "softmax", times["softmax"], times["flow"], None))

    _, heads, _, head_dim = sizes.windows
    shapes = [(1, heads, length, head_dim) for length in sizes.lengths]
    # All lengths in the same rounds: how the cost grows is a ratio, too.
    contenders = {
        f"{form} {shape[2]}": partial(forward_backward, form, make_inputs(shape))
        for shape in shapes
        for form in FORMS
        if not _skipped(form, shape[2])
    }
    timings = interleaved(contenders, repetitions)
    for shape in shapes:
        length = shape[2]
        what = f"attention forward + backward, {_case(shape)}"
        flow = timings[f"flow {length}"]
        for form in FORMS:
            if reason := _skipped(form, length):
                section.rows.append(Row(what, _named(form), "x", None, None, reason))
                continue
            timing = timings[f"{form} {length}"]
            memory = peak_memory(forward_backward_of, form, shape, warm_up=(form, (1, heads, 16, head_dim)))
            section.measurements.append(Measurement(form, _case(shape), length, timing, memory))
            if form != "flow":
                section.rows.append(_faster(what, _named(form), timing, flow, LONG_GOALS.get((form, length))))
    if {3_072, 49_152} <= set(sizes.lengths):
        section.rows += _growth_rows(section, timings)
    return section


def _measure_shape(
    section: Section, shape: Shape, forms: tuple[str, ...], repetitions: int
) -> dict[str, Timing]:
    inputs = make_inputs(shape)
    timings = interleaved({form: partial(forward_backward, form, inputs) for form in forms}, repetitions)
    for form, timing in timings.items():
        warm_up = (form, (1, *shape[1:2], 16, shape[3]))
        memory = peak_memory(forward_backward_of, form, shape, warm_up=warm_up)
        section.measurements.append(Measurement(form, _case(shape), shape[0] * shape[2], timing, memory))
    return timings


def _growth_rows(section: Section, timings: dict[str, Timing]) -> list[Row]:
    memory = {m.size: m.peak_memory_bytes for m in section.measurements if m.contender == "flow"}
    short, long = memory[3_072], memory[49_152]
    assert short is not None
    assert long is not None
    growth = timings["flow 49152"].ratio_to(timings["flow 3072"])
    same = (long / short,) * 3
    what, against = "the same, 49,152 tokens", "3,072 tokens"
    return [
        Row(f"{what}: time", against, "x", growth, Goal(18.0, at_least=False)),
        Row(f"{what}: peak memory", against, "x", Spread(*same), Goal(17.0, at_least=False)),
    ]


def _faster(what: str, against: str, baseline: Timing, ours: Timing, goal: float | None) -> Row:
    return Row(what, against, "x", baseline.ratio_to(ours), None if goal is None else Goal(goal))


def _skipped(form: str, length: int) -> str:
    """Why this form is not measured at this length; empty where it is."""
    if form == "authors" and length > LONGEST_AUTHORS:
        return (
            f"its (4, {length:,}, 64, 64) tensor takes {4 * length * 64 * 64 * 4 / 1e9:.1f} GB, several times"
        )
    if form == "softmax" and length > LONGEST_SOFTMAX:
        return f"{(length / LONGEST_SOFTMAX) ** 2:.0f} times the work of {LONGEST_SOFTMAX:,} tokens"
    return ""


def _named(form: str) -> str:
    return {"authors": "authors' form", "softmax": "softmax", "flow": "flow"}[form]


def _case(shape: Shape) -> str:
    return " x ".join(f"{size:,}" for size in shape)
