"""The benchmark measures what it says: baselines compute the same, counts are right, reports are well formed.

Timings decide nothing here.
"""

import pytest
import torch
from attention import authors_flow_attention, make_inputs
from update import use_authors_attention
from workload import make_episodes

from flowrl.attention import naive_flow_attention
from flowrl.data.sampler import WindowSampler
from flowrl.model.transformer import ModelConfig, SequenceModel


@pytest.mark.parametrize("length", [1, 2, 61])
def test_the_authors_form_is_the_naive_formula(length):
    inputs = tuple(x.detach().double().mul(3).requires_grad_() for x in make_inputs((2, 3, length, 8)))
    weights = torch.randn(2, 3, length, 8, dtype=torch.float64)
    results = []
    for form in (authors_flow_attention, naive_flow_attention):
        outputs = form(*inputs)
        results.append((outputs, *torch.autograd.grad((outputs * weights).sum(), inputs)))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)


def test_a_model_with_the_authors_form_predicts_the_same():
    dataset = make_episodes(400)
    window = WindowSampler(dataset, 20, 8, seed=1).sample().window
    model = SequenceModel(ModelConfig(11, 3, 1000, num_layers=2, embed_dim=32)).eval()
    expected = model(window)
    use_authors_attention(model)
    torch.testing.assert_close(model(window), expected, rtol=1e-4, atol=1e-5)
