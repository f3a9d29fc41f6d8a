"""The exponential moving average of the weights: what it is, who uses it, and that it survives a stop."""

import torch
from safetensors.torch import load_file
from tiny_training import train_here

import flowrl
from flowrl.training.trainer import Trainer


def recorded_training(tiny_dataset, run, monkeypatch, **options):
    """Train, and return the weights before the first update and after each one."""
    weights, update = [], Trainer.update

    def recording_update(self):
        if not weights:
            weights.append([p.detach().double().clone() for p in self.state.model.parameters()])
        update(self)
        weights.append([p.detach().double().clone() for p in self.state.model.parameters()])

    monkeypatch.setattr(Trainer, "update", recording_update)
    train_here(tiny_dataset, run, **options)
    return weights


def test_the_average_is_the_recursion_over_all_updates(tiny_dataset, tmp_path, monkeypatch):
    weights = recorded_training(tiny_dataset, tmp_path / "run", monkeypatch, steps=40, ema_decay=0.7)
    average = weights[0]
    for update, current in enumerate(weights[1:]):
        decay = min(0.7, (1 + update) / (10 + update))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, current, strict=True)]
    agent = flowrl.load_agent(tmp_path / "run")
    for loaded, expected, last in zip(agent.model.parameters(), average, weights[-1], strict=True):
        torch.testing.assert_close(loaded.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(loaded.double(), last)


def test_the_average_never_changes_what_updates_compute(tiny_dataset, tmp_path):
    for decay in (0, 0.999):
        train_here(tiny_dataset, tmp_path / str(decay), steps=20, ema_decay=decay)
    with_average = load_file(tmp_path / "0.999/checkpoints/step-00000020/training.safetensors")
    without = load_file(tmp_path / "0/checkpoints/step-00000020/model.safetensors")
    for name in (name for name in with_average if name.startswith("model.")):
        assert torch.equal(with_average[name], without[name.removeprefix("model.")])
