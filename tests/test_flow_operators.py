"""Flow-Attention under torch's own tools, and kernels that are wrong or raise, against the naive form."""

import warnings

import pytest
import torch
from attention_forms import assert_all_close, tokens, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from flowrl.attention import flow_attention, naive_flow_attention
from flowrl.attention.flow import cpu
from flowrl.native import kernels

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
LENGTHS = (40, 200)  # one block, several


def inputs_of(length, width=16, **options):
    return tokens(length, batch=2, head_dim=width, value_dim=width, **options)


def largest_error(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return max(float((a - b).detach().abs().max() / max(1, float(b.detach().abs().max()))) for a, b in pairs)


def derivatives(attention, inputs, times):
    """Gradients of the sum of squares of gradients of ... of the outputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    results = [attention(*inputs)]
    for _ in range(times):
        results = torch.autograd.grad(sum(x.square().sum() for x in results), inputs, create_graph=True)
    return results


@pytest.mark.parametrize(("width", "length", "most"), [(16, 40, 3), (16, 200, 2), (12, 200, 2)])
def test_higher_derivatives(width, length, most):
    inputs = inputs_of(length, width)[:3]
    for times in range(2, most + 1):
        expected = derivatives(naive_flow_attention, inputs, times)
        assert largest_error(derivatives(flow_attention, inputs, times), expected) < 1e-10


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_function_transforms(length, causal):
    queries, keys, values, direction = inputs_of(length)
    many, results = torch.stack((queries, direction, -queries)), []
    for attention in (flow_attention, naive_flow_attention):

        def by_queries(x, attention=attention):
            return attention(x, keys, values, causal=causal)

        def loss(x, by_queries=by_queries):
            return by_queries(x).square().sum()

        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(by_queries(forward_ad.make_dual(queries, direction))).tangent
        transformed = (vmap(by_queries)(many), grad(loss)(queries), vmap(grad(loss))(many), tangent)
        results.append((*transformed, *jvp(by_queries, (queries,), (direction,))))
    assert largest_error(*results) < 1e-10


def test_operators_pass_torchs_own_checks():
    inputs = [x.requires_grad_() for x in inputs_of(70)[:3]]
    forward = torch.ops.flowrl.flow_forward.default
    torch.library.opcheck(forward, (*inputs, 10.0, 1e-6, True))
    results = [x.detach() for x in forward(*inputs, 10.0, 1e-6, True)]
    gradient = torch.randn_like(results[0])
    backward = torch.ops.flowrl.flow_backward.default
    torch.library.opcheck(backward, (*[x.detach() for x in inputs], gradient, *results, 10.0, 1e-6))


class Layer(torch.nn.Module):
    """What people call flow_attention from."""

    def __init__(self, width, causal=True):
        super().__init__()
        torch.manual_seed(0)
        self.width, self.causal = width, causal
        self.project = torch.nn.Linear(2 * width, 6 * width)

    def forward(self, x):
        queries, keys, values = self.project(x).unflatten(-1, (3, 2, self.width)).permute(2, 0, 3, 1, 4)
        return flow_attention(queries, keys, values, causal=self.causal).transpose(1, 2).flatten(2)


def with_input_gradient(module, x):
    x = x.clone().requires_grad_()
    outputs = module(x)
    outputs.square().sum().backward()
    return outputs.detach(), x.grad


@pytest.mark.parametrize(("width", "causal"), [(16, True), (12, False)])
def test_compiled_whole_with_dynamic_length(width, causal):
    torch._dynamo.reset()
    layer = Layer(width, causal)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        x = torch.randn(2, length, 2 * width)
        assert largest_error(with_input_gradient(compiled, x), with_input_gradient(layer, x)) < 1e-5


def test_exported_with_dynamic_length_into_torchs_own_operations():
    """Of a width that C++ does otherwise."""
    layer = Layer(16)
    shapes = ({1: torch.export.Dim("length", min=2, max=4096)},)
    exported = torch.export.export(layer, (torch.randn(2, 40, 32),), dynamic_shapes=shapes)
    assert "flowrl" not in str(exported.graph)
    for length in (7, 200):
        x = torch.randn(2, length, 32)
        assert largest_error([exported.module()(x)], [layer(x)]) < 1e-5


def attend(inputs):
    """Outputs, gradients, and the messages of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = with_gradients(flow_attention, *inputs)
        with_gradients(flow_attention, *inputs)  # the second time warns of nothing
    return results, [str(warning.message) for warning in caught]


def assert_torch_took_over(reason):
    inputs = inputs_of(10)
    results, messages = attend([x.float() for x in inputs])
    assert_all_close(results, with_gradients(naive_flow_attention, *inputs), 1e-5)
    assert len(messages) == 1
    assert messages[0].startswith("Flow-Attention in C++ ")
    assert reason in messages[0]
    assert messages[0].endswith("; torch is used instead")


def spoil(monkeypatch, name, change):
    """Let a call of the C++ library be followed by ``change`` of its tensors."""
    call = cpu._call

    def spoilt(function, layout, *tensors):
        call(function, layout, *tensors)
        if function == name:
            change(*tensors)

    monkeypatch.setattr(cpu, "_call", spoilt)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: x.mul_(1.01), "differs from torch by"),
        (lambda x: x[..., -1].fill_(torch.nan), "differs from torch by"),
        (lambda x: 1 / 0, "failed: division by zero"),
        (lambda x: x[:, :, cpu.BLOCK :].mul_(1.01), "differs from torch by"),  # in later blocks alone
    ],
)
@pytest.mark.parametrize(("name", "place"), [("flow_forward", 3), ("flow_backward", -1)])
def test_a_wrong_kernel_is_found_out_before_its_first_use(unchecked, monkeypatch, name, place, wrong, reason):
    spoil(monkeypatch, name, lambda *tensors: wrong(tensors[place]))
    assert_torch_took_over(reason)


@pytest.mark.parametrize("name", ["flow_forward", "flow_backward"])
def test_a_kernel_that_raises_later_is_replaced_by_torch(unchecked, monkeypatch, name):
    flow_attention(*(x.float() for x in inputs_of(3)[:3]))  # the check passes
    spoil(monkeypatch, name, lambda *tensors: 1 / 0)
    assert_torch_took_over("failed: division by zero")


def test_a_kernel_without_memory_raises(unchecked, monkeypatch):
    def without_memory(*tensors):
        raise torch.OutOfMemoryError

    flow_attention(*(x.float() for x in inputs_of(3)[:3]))  # the check passes
    spoil(monkeypatch, "flow_forward", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        flow_attention(*(x.float() for x in inputs_of(3)[:3]))


def test_the_switch_turns_every_kernel_off(unchecked, monkeypatch):
    called, call = [], cpu._call
    monkeypatch.setattr(cpu, "_call", lambda name, *rest: (called.append(name), call(name, *rest)))
    inputs = inputs_of(40)
    monkeypatch.setenv("FLOWRL_KERNELS", "off")
    results, messages = attend(inputs)
    assert (called, messages) == ([], [])
    assert_all_close(results, with_gradients(naive_flow_attention, *inputs), 1e-10)
    monkeypatch.setenv("FLOWRL_KERNELS", "on")
    attend(inputs)
    assert "flow_backward" in called


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, FakeTensorMode])
def test_the_first_use_may_be_in_any_mode(unchecked, context):
    """The check needs gradients and real numbers; the mode that the caller has set is not its concern."""
    with context(), torch.autocast("cpu", torch.bfloat16):
        flow_attention(*(torch.zeros(1, 2, 3, 16) for _ in range(3)))
    _, messages = attend(inputs_of(40, dtype=torch.float32))
    assert messages == []
    assert all(kernels._trusted.values())
    assert kernels._trusted
