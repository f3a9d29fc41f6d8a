"""The products of linear layers in C++ against the same in float64, and which products they are for."""

import pytest
import torch
from torch import nn

from flowrl.model import products
from flowrl.native.products import Linear, input_gradient, multiply, weight_gradient

needs_compiler = pytest.mark.skipif(
    products.products_library() is None, reason="no g++, or none for this machine"
)
SHAPES = [  # rows, inputs, outputs: tiles, chunks and panels, whole and not
    (1, 32, 32),
    (7, 32, 96),
    (95, 64, 64),
    (96, 96, 32),
    (200, 64, 160),
    (700, 160, 1056),
    (1300, 1024, 96),
]


@pytest.fixture
def native(monkeypatch):
    """Use C++ on every machine that can build it, for any number of rows."""
    monkeypatch.setattr(products, "library_is_held_back", lambda: True)
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)


@pytest.fixture
def called(monkeypatch):
    """The names of the C++ functions called."""
    names, call = [], products._call
    monkeypatch.setattr(products, "_call", lambda name, *rest: (names.append(name), call(name, *rest)))
    return names


def operands(rows, inputs, outputs):
    torch.manual_seed(0)
    return torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)


def assert_exact(actual, expected, terms):
    """As close as float32 sums of so many terms are."""
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-6 * terms**0.5 * max(1.0, expected.abs().max().item() ** 0.5)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(shape, native, called):
    rows, inputs, outputs = shape
    x, weight, gradient = operands(*shape)
    bias = torch.randn(outputs)
    assert_exact(multiply(x, weight), x.double() @ weight.double().T, inputs)
    assert_exact(multiply(x, weight, bias), x.double() @ weight.double().T + bias.double(), inputs)
    assert_exact(input_gradient(gradient, weight), gradient.double() @ weight.double(), outputs)
    assert_exact(weight_gradient(gradient, x), gradient.double().T @ x.double(), rows)
    assert called == ["linear_outputs"] * 2 + ["linear_input_gradient", "linear_weight_gradient"]


@needs_compiler
def test_any_memory_layout(native, called):
    x, weight, gradient = operands(200, 64, 96)
    spread = torch.stack([x, x], dim=2)[:, :, 0]
    assert torch.equal(multiply(spread, weight.T.contiguous().T), multiply(x, weight))
    assert torch.equal(weight_gradient(gradient.T.contiguous().T, spread), weight_gradient(gradient, x))
    assert torch.equal(input_gradient(gradient, weight.T.contiguous().T), input_gradient(gradient, weight))
    assert len(called) == 6


@needs_compiler
@pytest.mark.parametrize("shape", [(700, 160, 288), (700, 800, 96)])  # weights wider on either side
def test_threads_change_no_bit(shape, native):
    x, weight, gradient = operands(*shape)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(
                (multiply(x, weight), input_gradient(gradient, weight), weight_gradient(gradient, x))
            )
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        assert all(map(torch.equal, outcome, outcomes[0]))


@needs_compiler
def test_what_is_not_a_number_stays_in_its_row(native):
    x, weight, gradient = operands(200, 64, 96)
    x[3, 5] = float("nan")
    outputs = multiply(x, weight)
    assert outputs[3].isnan().all()
    assert outputs.isnan().sum() == 96
    assert weight_gradient(gradient, x)[:, 5].isnan().all()


@needs_compiler
@pytest.mark.parametrize("rows", [(150,), (3, 50), (2, 3, 40)])
def test_the_layer_is_torchs(rows, native, called):
    torch.manual_seed(0)
    ours, theirs = Linear(64, 96), nn.Linear(64, 96)
    theirs.load_state_dict(ours.state_dict())
    x, weights = torch.randn(*rows, 64), torch.randn(*rows, 96)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        outputs = layer(leaf)
        gradients = torch.autograd.grad((outputs * weights).sum(), (leaf, *layer.parameters()))
        results.append((outputs, *gradients))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(called) == 3


@needs_compiler
def test_the_rest_goes_to_torch(monkeypatch, native, called):
    """Other types and widths, bfloat16 by autocast, few rows, and all where the library is fast itself."""
    layer, x = Linear(64, 96), torch.randn(200, 64)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert Linear(11, 96)(x[:, :11]).shape == (200, 96)
    assert Linear(64, 3)(x).shape == (200, 3)
    assert called == []
    monkeypatch.setattr(products, "FEWEST_ROWS", 201)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)
    monkeypatch.setattr(products, "library_is_held_back", lambda: False)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert called == []


@pytest.mark.parametrize(
    ("vendor", "capability", "held_back"),
    [
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),  # all the width there is
    ],
)
def test_mkl_is_held_back_on_wide_vectors_of_other_makers(
    monkeypatch, tmp_path, vendor, capability, held_back
):
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.library_is_held_back.__wrapped__() is held_back
