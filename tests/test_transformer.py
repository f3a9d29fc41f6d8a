"""The sequence model against the same model written out plainly, without any of its shortcuts."""

import math
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from attention_forms import NAIVE

from flowrl.model.transformer import INIT_STD, MixerName, ModelConfig, SequenceModel
from flowrl.window import Window

LAYOUTS = ("interleaved", "fused")
KINDS = get_args(MixerName)


def give_units(model, low=(-2.0, 0.0), high=(1.0, 0.5)):
    """Uneven units of three observations and of the actions."""
    model.observation_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    model.observation_std.copy_(torch.tensor([2.0, 0.5, 1.0]))
    model.action_low.copy_(torch.tensor(low))
    model.action_high.copy_(torch.tensor(high))


def make_model(layout="interleaved", attention="flow", seed=0, dtype=torch.float64, noise=0.3, **options):
    """A model whose weights are large enough that every input matters, with uneven action bounds."""
    torch.manual_seed(seed)
    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "dropout": 0.1, "max_timesteps": 40}
    sizes |= {"context_tokens": 12, "source_clamp": 0.9}  # which binds
    choices = options.get("action_choices", ())
    config = ModelConfig(3, sum(choices) or 2, attention=attention, token_layout=layout, **sizes | options)
    model = SequenceModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    give_units(model, *((0.0, 1.0) if choices else ()))
    model.return_scale.fill_(50.0)
    return model.to(dtype).eval()


def make_window(batch=3, length=7, first_timesteps=(0, 5, 31), seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    timesteps = torch.tensor(first_timesteps)[:, None] + torch.arange(length)
    actions = torch.rand((batch, length, 2), generator=generator, dtype=dtype)
    previous = torch.cat((torch.rand((batch, 1, 2), generator=generator, dtype=dtype), actions[:, :-1]), 1)
    valid = torch.ones(batch, length, dtype=torch.bool)
    returns_to_go = 30 + 20 * normal(batch, length)
    return Window(normal(batch, length, 3), actions, previous, returns_to_go, timesteps, valid)


def window_of(observations, actions, previous_actions, returns_to_go, start=0):
    """Valid timesteps from ``start`` on, of (batch, length, ...) arrays."""
    arrays = (observations, actions, previous_actions, returns_to_go)
    tensors = [torch.as_tensor(np.asarray(array, np.float32)) for array in arrays]
    timesteps = torch.arange(start, start + tensors[0].shape[1]).expand(tensors[3].shape)
    return Window(*tensors, timesteps, torch.ones(timesteps.shape, dtype=torch.bool))


PLAIN = {
    **NAIVE,
    "flow": partial(NAIVE["flow"], clamp=0.9),
    "cosformer": partial(NAIVE["cosformer"], max_tokens=12),
}


def plain_gru(x, gru):
    """Cho et al. (2014), with torch's second bias inside the reset gate's product."""
    hidden, outputs = torch.zeros_like(x[0]), []
    for token in x:
        read = (gru.weight_ih_l0 @ token + gru.bias_ih_l0).chunk(3)
        remembered = (gru.weight_hh_l0 @ hidden + gru.bias_hh_l0).chunk(3)
        reset, update = (torch.sigmoid(a + b) for a, b in zip(read[:2], remembered[:2], strict=True))
        hidden = (1 - update) * torch.tanh(read[2] + reset * remembered[2]) + update * hidden
        outputs.append(hidden)
    return torch.stack(outputs)


def plain_attention(x, attention, config):
    q, k, v = (
        part.reshape(len(x), config.num_heads, -1).transpose(0, 1)[None]
        for part in attention.qkv(x).chunk(3, dim=-1)
    )
    return attention.project(PLAIN[config.attention](q, k, v)[0].transpose(0, 1).reshape(len(x), -1))


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def plain_forward(model, window):
    """Every token through every layer, one row at a time, written from the description."""
    low, high, config = model.action_low, model.action_high, model.config
    rows = []
    for row in range(len(window.observations)):
        observations, actions, previous, returns, timesteps, _ = (tensor[row] for tensor in window)
        tokens = []
        for t in range(len(returns)):
            time = model.embed_timestep.weight[min(int(timesteps[t]), config.max_timesteps - 1)]
            target = model.embed_return(returns[t : t + 1] / model.return_scale)
            shown = (observations[t] - model.observation_mean) / model.observation_std
            state = model.embed_observation(shown)
            if config.token_layout == "interleaved":
                action = model.embed_action(2 * (actions[t] - low) / (high - low) - 1)
                tokens += [target + time, state + time, action + time]
            else:
                start = timesteps[t] == 0
                before = model.embed_action(2 * (previous[t] - low) / (high - low) - 1)
                tokens.append(target + state + time + (model.start_token if start else before))
        x = torch.stack(tokens)
        for lag in range(config.convolution_width):  # the map's last part is of the token itself
            part = config.convolution_width - 1 - lag
            weight = model.convolution.map.weight.unflatten(1, (config.convolution_width, -1))[:, part]
            for t in range(lag, len(tokens)):
                x[t] = x[t] + weight @ tokens[t - lag]
        if config.convolution_width > 0:
            x = x + model.convolution.map.bias
        x = layer_norm(x, model.embed_norm)
        for block in model.blocks:
            normed = layer_norm(x, block.attention_norm)
            if config.attention == "gru":
                x = x + plain_gru(normed, block.attention.gru)
            else:
                x = x + plain_attention(normed, block.attention, config)
            x = x + block.mlp[2](block.mlp[0](layer_norm(x, block.mlp_norm)).clamp(min=0))
        x = layer_norm(x, model.final_norm)
        read = x[1::3] if config.token_layout == "interleaved" else x
        rows.append(torch.tanh(read @ model.predict_action.weight.T + model.predict_action.bias))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("attention", "convolution_width"), [*((kind, 0) for kind in KINDS), ("flow", 3), ("softmax", 2)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_is_the_description_without_its_shortcuts(layout, attention, convolution_width):
    model = make_model(layout, attention, convolution_width=convolution_width)
    window = make_window()
    with torch.no_grad():
        expected, actual = plain_forward(model, window), model(window)
    assert actual.shape == (3, 7, 2)
    assert (actual - expected).abs().max() < 1e-10
    assert actual.std() > 0.1  # far from a constant: everything compared above mattered


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_no_valid_output_no_loss_and_no_gradient(layout, attention):
    model, window = make_model(layout, attention), make_window()
    lengths = torch.tensor([7, 3, 1])
    valid, results = torch.arange(7) < lengths[:, None], []
    for seed, scale in ((2, 1.0), (3, 1e4), (4, 0.0)):
        junk = make_window(seed=seed)
        padded = Window(
            *(
                torch.where(valid.view(3, 7, *[1] * (a.ndim - 2)), a, (scale * b).to(a.dtype))
                for a, b in zip(window, junk, strict=True)
            )
        )._replace(valid=valid)
        model.zero_grad()
        loss = model.loss(padded)
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((model(padded)[valid].detach(), loss.detach(), gradients))
    for outputs, loss, gradients in results[1:]:
        assert (outputs - results[0][0]).abs().max() < 1e-12
        assert abs(loss - results[0][1]) < 1e-12
        assert (gradients - results[0][2]).abs().max() < 1e-10
    for row, length in enumerate(lengths):  # and the row alone gives the same
        alone = model(Window(*(tensor[row : row + 1, :length] for tensor in window)))[0]
        assert (alone - model(window)[row, :length]).abs().max() < 1e-12


def test_loss_is_the_mean_square_over_valid_actions():
    model, window = make_model(), make_window()
    valid = torch.arange(7) < torch.tensor([2, 7, 4])[:, None]
    low, high = torch.tensor([[-2.0, 0.0], [1.0, 0.5]])
    errors = (model(window).detach() - (window.actions - low) / (high - low) * 2 + 1).square()[valid]
    assert errors.shape == (13, 2)
    loss = model.loss(window._replace(valid=valid)).item()
    assert loss == pytest.approx(errors.mean().item(), rel=1e-6)  # computed in float32


def test_sinusoidal_time_continues_past_the_longest_episode_and_none_ignores_it():
    window = make_window()
    later = window._replace(timesteps=window.timesteps + 10_000)
    without = make_model(time_encoding="none")
    assert torch.equal(without(window), without(later))
    model = make_model(time_encoding="sinusoidal")
    assert not torch.allclose(model(later), model(later._replace(timesteps=later.timesteps + 1)))
    timesteps = torch.tensor([0, 3, 500])
    angles = [[t / 10_000 ** (2 * wave / 16) for wave in range(8)] for t in timesteps.tolist()]
    expected = torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles]).double()
    actual = (model.embed_timestep(timesteps) / model.embed_timestep.scale).double()
    assert torch.allclose(actual, expected, atol=1e-4)
    new = SequenceModel(ModelConfig(3, 2, 9, time_encoding="sinusoidal"))
    assert new.embed_timestep(torch.arange(9)).square().mean().sqrt().item() == pytest.approx(INIT_STD)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights(layout):
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(17, 6, 1000, token_layout=layout, embed_dim=128))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float(name.endswith("weight"))).all(), name
        else:
            tolerance = 5 / math.sqrt(2 * parameter.numel())  # five standard errors of a standard deviation
            assert parameter.std().item() == pytest.approx(INIT_STD, rel=tolerance), name
            assert abs(parameter.mean().item()) < 5 * INIT_STD / math.sqrt(parameter.numel()), name
    assert ("start_token" in dict(model.named_parameters())) == (layout == "fused")
