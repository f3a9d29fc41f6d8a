"""What only a CUDA device can show; everything here is skipped where there is none."""

import pytest
import torch
from attention_forms import assert_all_close, tokens, with_gradients
from safetensors.torch import load_file
from tiny_training import assert_same_end, figures, resume_here, train_here
from workload import Sizes, open_trainer, paper_config, training_data

from flowrl.attention import flow_attention, naive_flow_attention
from flowrl.attention.flow.triton import fits, supports

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

GPU_TRAINING = {"device": "cuda", "embed_dim": 64, "dropout": 0.1, "checkpoint_every": 50, "eval_episodes": 0}


@pytest.mark.parametrize("length", [1, 59, 64, 65, 128, 1000, 3072])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_kernels_are_chosen_and_agree_with_the_naive_form(length, head_dim):
    inputs = [x.cuda() for x in tokens(length, batch=2, head_dim=head_dim, value_dim=head_dim)]
    assert not supports(*inputs[:3])  # float64: torch does that
    exact = with_gradients(naive_flow_attention, *inputs)
    assert_all_close(with_gradients(flow_attention, *inputs), exact, 1e-10)
    rounded = [x.float() for x in inputs]
    assert not supports(*rounded[:2], rounded[2][..., :5])
    assert supports(*rounded[:3]) == fits(torch.cuda.get_device_capability(), head_dim)
    assert_all_close(with_gradients(flow_attention, *rounded), exact, 1e-5)


@pytest.mark.parametrize("length", [59, 3072])
def test_bfloat16_kernels_are_as_exact_as_their_inputs(length):
    inputs = [x.cuda().bfloat16() for x in tokens(length, batch=2, head_dim=64, value_dim=64)]
    exact = with_gradients(naive_flow_attention, *(x.double() for x in inputs))
    for value, reference in zip(with_gradients(flow_attention, *inputs), exact, strict=True):
        allowed = 2**-7 * reference.abs() + (2**-9 if length < 64 else 2**-7) * reference.abs().max()
        assert ((value.double() - reference).abs() <= allowed).all()


@pytest.mark.parametrize("context_length", [6, "episode"])
def test_a_resumed_training_equals_an_uninterrupted_one(tiny_dataset, tmp_path, context_length):
    """300 updates against 150 and 150: graphs, eager steps of shorter batches, dropout and batches alike."""
    options = {**GPU_TRAINING, "context_length": context_length, "schedule": "constant", "warmup_steps": 5}
    train_here(tiny_dataset, tmp_path / "straight", steps=300, **options)
    train_here(tiny_dataset, tmp_path / "run", steps=150, **options)
    resume_here(tmp_path / "run", steps=300)
    assert_same_end(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("q_weight", [0, 0.1])
def test_a_captured_step_is_the_eager_one(tiny_dataset, tmp_path, monkeypatch, q_weight):
    """The same random numbers, learning rates and batches: the same weights, bit for bit."""
    train_here(tiny_dataset, tmp_path / "captured", steps=40, q_weight=q_weight, **GPU_TRAINING)
    monkeypatch.setattr("flowrl.training.cuda_graph.WARM_UPS", 1_000)
    train_here(tiny_dataset, tmp_path / "eager", steps=40, q_weight=q_weight, **GPU_TRAINING)
    ends = [tmp_path / name / "checkpoints" / "step-00000040" for name in ("captured", "eager")]
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    losses = [line["loss"] for line in figures(tmp_path / "captured", "train")]
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_an_update_never_waits_for_the_device():
    sizes = Sizes(num_layers=1, embed_dim=64, transitions=5_000)
    config = paper_config(sizes)
    with open_trainer(config, training_data(sizes, config), "cuda") as trainer:
        for _ in range(6):  # the capture itself waits
            trainer.update()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(20):
                trainer.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(torch.stack(trainer.state.pending)).all()
