"""Training windows against the episodes they are cut from."""

from collections import Counter

import numpy as np
import pytest
from conftest import dataset_of

from flowrl.data.sampler import WindowSampler
from flowrl.training.config import TrainConfig
from flowrl.training.setup import batch_size

LENGTHS = np.array([9, 1, 14, 30, 6])
STARTS = np.array([0, 9, 10, 24, 54])
EPISODE_OF = np.repeat(np.arange(5), LENGTHS)


def make_dataset():
    """60 transitions that each carry their own number in every array."""
    number = np.arange(60, dtype=np.float32)
    observations = np.stack((number, EPISODE_OF), axis=1)
    return dataset_of(
        observations, number[:, None] + 1000, np.random.default_rng(0).uniform(size=60), LENGTHS
    )


def windows(window):
    """The transitions of each window, as lists of their numbers."""
    return [
        row[valid].tolist()
        for row, valid in zip(window.observations[..., 0].int(), window.valid, strict=True)
    ]


def every_window(context_length):
    """The windows by their definition: lists of transitions, and what their number of them is for each."""
    for start, length in zip(STARTS.tolist(), LENGTHS.tolist(), strict=True):
        if length <= context_length:
            yield from [range(start, start + length)] * length  # the episode fits: all of it
        else:
            for begin in range(1 - context_length, length):
                yield [start + t for t in range(begin, begin + context_length) if 0 <= t < length]


@pytest.mark.parametrize("context_length", [1, 2, 6, 9, 10, 30, 1000])
def test_every_window_there_is(context_length):
    """Exhaustive: each window's number, every entry of the batch against the arrays."""
    dataset = make_dataset()
    sampler = WindowSampler(dataset, context_length, 60, seed=0)
    batch = sampler.gather(np.arange(sampler.num_windows))
    assert batch.window.valid.shape[1] == min(context_length, 30)
    for number, (window, expected) in enumerate(
        zip(windows(batch.window), every_window(context_length), strict=True)
    ):
        first = STARTS[EPISODE_OF[expected[0]]]
        assert window == list(expected)
        assert batch.spans[number].tolist() == [expected[0], expected[-1] + 1]
        padded = batch.window.valid.shape[1] - len(expected)
        assert batch.window.valid[number].tolist() == [True] * len(expected) + [False] * padded
        size = len(expected)
        assert batch.window.timesteps[number, :size].tolist() == [index - first for index in expected]
        np.testing.assert_array_equal(batch.window.actions[number, :size, 0], np.array(expected) + 1000)
        np.testing.assert_array_equal(
            batch.window.returns_to_go[number, :size], dataset.returns_to_go[expected]
        )
        for padded_with_the_last in batch.window[:5]:
            last = padded_with_the_last[number, size - 1]
            assert (padded_with_the_last[number, size:] == last).all()
        for place, index in enumerate(expected):
            if index > first:  # unused at an episode's start
                assert batch.window.previous_actions[number, place, 0] == index - 1 + 1000
    assert batch.num_timesteps == int(batch.window.valid.sum())
    assert all(tensor.isfinite().all() for tensor in batch.window[:5])


@pytest.mark.parametrize("context_length", [4, 100])
def test_draws_are_uniform_over_windows(context_length):
    """A chi-square statistic on the drawn windows: of those cut from episodes, or of whole episodes."""
    draws = 60_000
    sampler = WindowSampler(make_dataset(), context_length, draws, seed=1)
    counts, expected = Counter(map(tuple, sampler.sample().spans.tolist())), Counter()
    for window in every_window(context_length):
        expected[window[0], window[-1] + 1] += draws / sampler.num_windows
    assert set(counts) <= set(expected)
    statistic = sum((counts[span] - count) ** 2 / count for span, count in expected.items())
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of chi-square


@pytest.mark.parametrize("context_length", ["episode", 1000, 1])
def test_timesteps_per_update_decide_the_number_of_windows(context_length):
    dataset = make_dataset()
    sampler = WindowSampler(dataset, 30 if context_length == "episode" else context_length, 1, seed=0)
    mean = sampler.gather(np.arange(sampler.num_windows)).num_timesteps / sampler.num_windows
    config = TrainConfig(context_length=context_length, timesteps_per_update=1280)
    assert batch_size(config, dataset) == round(1280 / mean)
