"""Training windows against the episodes they are cut from."""

import numpy as np
import pytest
import torch

from flowrl.data.episodes import build_episodes
from flowrl.data.sampler import WindowSampler

LENGTHS = np.array([9, 1, 14, 30, 6])
STARTS = np.array([0, 9, 10, 24, 54])
EPISODE_OF = np.repeat(np.arange(5), LENGTHS)


def make_dataset():
    """60 transitions that each carry their own number in every array."""
    number = np.arange(60, dtype=np.float32)
    return build_episodes(
        observations=np.stack((number, EPISODE_OF), axis=1),
        actions=number[:, None] + 1000,
        rewards=np.random.default_rng(0).uniform(size=60),
        episode_lengths=LENGTHS,
        terminated=np.ones(5, bool),
        dataset_id="numbered",
        where="numbered",
    )


def windows(batch):
    """The transitions of each window, as lists of their numbers."""
    return [
        row[valid].tolist() for row, valid in zip(batch.observations[..., 0].int(), batch.valid, strict=True)
    ]


@pytest.mark.parametrize("context_length", [1, 2, 6, 9, 10, 30, 1000])
def test_windows_from_every_transition(context_length):
    """Exhaustive: each transition as the drawn start, every entry of the batch against the arrays."""
    dataset = make_dataset()
    sampler = WindowSampler(dataset, context_length, 60, seed=0)
    batch = sampler.gather(torch.arange(60))
    assert batch.valid.shape[1] == min(context_length, 30)
    for drawn, window in enumerate(windows(batch)):
        episode = EPISODE_OF[drawn]
        first, stop = STARTS[episode], STARTS[episode] + LENGTHS[episode]
        if LENGTHS[episode] <= context_length:
            expected = list(range(first, stop))  # the episode fits: all of it
        else:
            expected = list(range(drawn, min(drawn + context_length, stop)))
        assert window == expected
        assert batch.starts[drawn] == expected[0]
        padded = batch.valid.shape[1] - len(expected)
        assert batch.valid[drawn].tolist() == [True] * len(expected) + [False] * padded
        size = len(expected)
        assert batch.timesteps[drawn, :size].tolist() == [index - first for index in expected]
        np.testing.assert_array_equal(batch.actions[drawn, :size, 0], np.array(expected) + 1000)
        np.testing.assert_array_equal(batch.returns_to_go[drawn, :size], dataset.returns_to_go[expected])
        for place, index in enumerate(expected):
            if index > first:  # at an episode's start nobody reads it
                assert batch.previous_actions[drawn, place, 0] == index - 1 + 1000
    assert batch.num_timesteps == int(batch.valid.sum())
    assert all(tensor.isfinite().all() for tensor in batch[:5])


@pytest.mark.parametrize("context_length", [4, 100])
def test_draws_are_uniform_over_transitions(context_length):
    """A chi-square statistic on the drawn starts: of windows where episodes are cut, else of episodes."""
    draws = 60_000
    sampler = WindowSampler(make_dataset(), context_length, draws, seed=1)
    starts = sampler.sample().starts.numpy()
    if context_length == 4:
        counts, expected = np.bincount(starts, minlength=60), np.full(60, draws / 60)
    else:
        counts, expected = np.bincount(EPISODE_OF[starts], minlength=5), draws * LENGTHS / 60
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of chi-square


def test_generator_state_brings_the_same_batches_back():
    sampler = WindowSampler(make_dataset(), 4, 8, seed=3)
    sampler.sample()
    state = sampler.generator_state
    expected = [sampler.sample() for _ in range(3)]
    torch.rand(5)  # the global random numbers have no part in it
    for restored in (sampler, WindowSampler(make_dataset(), 4, 8, seed=99)):
        restored.generator_state = state
        for before in expected:
            assert all(torch.equal(a, b) for a, b in zip(before[:7], restored.sample()[:7], strict=True))
    same_seed, other_seed = (WindowSampler(make_dataset(), 4, 8, seed) for seed in (3, 4))
    first = WindowSampler(make_dataset(), 4, 8, seed=3).sample().starts
    assert torch.equal(same_seed.sample().starts, first)
    assert not torch.equal(other_seed.sample().starts, first)


def test_batches_take_no_memory_beyond_the_arrays():
    """The dataset's own arrays are read in place: no windows are laid out, no copy is made."""
    dataset = make_dataset()
    sampler = WindowSampler(dataset, 4, 8, seed=0)
    before = sampler.gather(torch.tensor([20]))
    dataset.observations[20] = -5
    assert (sampler.gather(torch.tensor([20])).observations[0, 0] == -5).all()
    assert (before.observations[0, 0] != -5).any()
