"""The in-memory form of the data, and the windows that are cut from it, against plain loops."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from conftest import EPISODE_LENGTHS, dataset_of

from flowrl.data.dataset import EpisodeDataset, build_episodes, content_sha256, delayed_rewards
from flowrl.data.sampler import WindowSampler
from flowrl.envs.reference_scores import REFERENCE_SCORES
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.training.config import TrainConfig
from flowrl.training.setup import batch_size

LENGTHS = (3, 1, 5, 2)
STARTS = np.array([0, 9, 10, 24, 54])  # of episodes of EPISODE_LENGTHS
EPISODE_OF = np.repeat(np.arange(5), EPISODE_LENGTHS)


def arrays(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, np.ndarray]:
    random, steps = np.random.default_rng(seed), sum(lengths)
    return {
        "observations": random.normal(size=(steps, 4)).astype(np.float32),
        "actions": random.normal(size=(steps, 2)).astype(np.float32),
        "rewards": random.normal(size=steps).astype(np.float32),
        "episode_lengths": np.array(lengths),
        "terminated": random.random(len(lengths)) < 0.5,
    }


def build(**changes: Any) -> EpisodeDataset:
    return build_episodes(**{**arrays(), **changes}, dataset_id="test", where="somewhere.hdf5")


def naive_returns_to_go(rewards: np.ndarray, lengths: tuple[int, ...]) -> list[float]:
    result, start = [], 0
    for length in lengths:
        for step in range(length):
            result.append(sum(float(reward) for reward in rewards[start + step : start + length]))
        start += length
    return result


def test_offsets_and_returns_match_a_plain_loop():
    given, dataset = arrays(), build()
    assert dataset.episode_starts.tolist() == [0, 3, 4, 9]
    assert dataset.episode_lengths.tolist() == [3, 1, 5, 2]
    expected = naive_returns_to_go(given["rewards"], LENGTHS)
    np.testing.assert_allclose(dataset.returns_to_go, expected, rtol=1e-6)
    np.testing.assert_allclose(dataset.episode_returns, [expected[i] for i in (0, 3, 4, 9)], rtol=1e-12)
    assert dataset.terminated.tolist() == given["terminated"].tolist()
    assert (dataset.num_episodes, dataset.num_transitions, dataset.max_episode_length) == (4, 11, 5)
    assert (dataset.observation_dim, dataset.action_dim) == (4, 2)
    for name in ("observations", "actions", "rewards", "returns_to_go"):
        assert getattr(dataset, name).dtype == np.float32
    for name in ("episode_starts", "episode_lengths"):
        assert getattr(dataset, name).dtype == np.int64


def test_returns_to_go_keep_float32_precision_between_huge_episodes_and_over_many_steps():
    given = arrays((2, 100_000, 3, 2))
    given["rewards"][:2] = given["rewards"][-2:] = 1e30
    given["rewards"][2:-5] = 0.1
    dataset = build_episodes(**given, dataset_id="test", where="test")
    tenth = float(np.float32(0.1))
    np.testing.assert_allclose(dataset.returns_to_go[2:-5], tenth * np.arange(100_000, 0, -1), rtol=1e-6)
    expected = naive_returns_to_go(given["rewards"][-5:], (3, 2))
    np.testing.assert_allclose(dataset.returns_to_go[-5:], expected, rtol=1e-6)


def test_a_map_that_was_changed_in_memory_keeps_its_changes(tmp_path):
    np.save(tmp_path / "observations.npy", arrays()["observations"])
    observations = np.load(tmp_path / "observations.npy", mmap_mode="c")
    observations += 1
    dataset = build(observations=np.asarray(observations))
    np.testing.assert_array_equal(dataset.observations, arrays()["observations"] + 1)


def test_delayed_rewards_put_the_return_on_the_last_step():
    dataset = build()
    delayed = delayed_rewards(dataset)
    returns = [float(dataset.episode_returns[i]) for i in range(4)]
    expected_rewards, expected_to_go = [], []
    for episode_return, length in zip(returns, LENGTHS, strict=True):
        expected_rewards += [0.0] * (length - 1) + [episode_return]
        expected_to_go += [episode_return] * length
    np.testing.assert_allclose(delayed.rewards, expected_rewards, rtol=1e-6)
    np.testing.assert_allclose(delayed.returns_to_go, expected_to_go, rtol=1e-6)
    np.testing.assert_allclose(delayed.episode_returns, returns, rtol=1e-6)
    assert delayed.sha256 == dataset.sha256
    assert np.shares_memory(delayed.observations, dataset.observations)
    assert dataset.rewards.tolist() == arrays()["rewards"].tolist()  # the original is untouched


@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_index(key, value):
    array = arrays()[key].copy()
    array.reshape(11, -1)[7, -1] = value
    array.reshape(11, -1)[9, 0] = value
    index = "7" if array.ndim == 1 else f"7, {array.shape[1] - 1}"
    with pytest.raises(UserError, match=rf"^somewhere\.hdf5: '{key}'\[{index}\] is {value}: "):
        build(**{key: array})


def test_an_environment_may_be_a_name():
    dataset, expected = build(environment="Hopper-v5"), EnvironmentSpec("Hopper-v5")
    assert (dataset.environment, dataset.reference) == (expected, REFERENCE_SCORES["hopper"])
    with pytest.raises(UserError, match=r"'Hoper-v5' is not registered .* did you mean 'Hopper-v5'"):
        build(environment="Hoper-v5")


def test_discrete_actions_are_one_hot():
    vectors = np.eye(3, dtype=np.float32)[np.arange(11) % 3]
    vectors[4] = [0.5, 0.5, 0]
    with pytest.raises(UserError, match=r"'actions'\[4\] is \[0.5, 0.5, 0.0\]: expected one-hot vectors"):
        build(actions=vectors, action_choices=(3,))
    with pytest.raises(UserError, match=r"3 numbers a row, one-hot vectors of choices of .* have 2"):
        build(actions=vectors, action_choices=(2,))


def test_float64_values_beyond_float32_and_overflowing_returns_are_refused():
    rewards = arrays()["rewards"].astype(np.float64)
    rewards[2] = 1e300
    with pytest.raises(UserError, match=r"'rewards'\[2\] is inf"), np.errstate(over="ignore"):
        build(rewards=rewards)
    with pytest.raises(UserError, match="summed to returns-to-go"):
        build(rewards=np.full(11, 3e38, dtype=np.float32))


def test_the_hash_is_of_the_content_alone_and_of_all_of_it():
    given, hashes = arrays(), {build().sha256}
    # Byte order and memory layout are not content.
    same = content_sha256(
        np.asfortranarray(given["observations"]).astype(">f4"),
        given["actions"],
        given["rewards"].astype(np.float64),
        given["episode_lengths"].astype(np.int32),
        given["terminated"],
    )
    assert hashes == {same}
    for key in ("observations", "actions", "rewards"):
        changed = given[key].copy()
        changed.reshape(-1)[5] = np.nextafter(changed.reshape(-1)[5], np.float32(9))
        hashes.add(build(**{key: changed}).sha256)
    hashes.add(build(episode_lengths=np.array([3, 1, 2, 5])).sha256)
    hashes.add(build(terminated=~given["terminated"]).sha256)
    # The same bytes cut into other shapes.
    hashes.add(build(observations=np.zeros((11, 4)), actions=np.zeros((11, 2))).sha256)
    hashes.add(build(observations=np.zeros((11, 2)), actions=np.zeros((11, 4))).sha256)
    assert len(hashes) == 8


def make_dataset():
    """60 transitions that each carry their own number in every array."""
    number = np.arange(60, dtype=np.float32)
    observations = np.stack((number, EPISODE_OF), axis=1)
    return dataset_of(
        observations, number[:, None] + 1000, np.random.default_rng(0).uniform(size=60), EPISODE_LENGTHS
    )


def windows(window):
    """The transitions of each window, as lists of their numbers."""
    return [
        row[valid].tolist()
        for row, valid in zip(window.observations[..., 0].int(), window.valid, strict=True)
    ]


def every_window(context_length):
    """The windows by their definition: lists of transitions, and what their number of them is for each."""
    for start, length in zip(STARTS.tolist(), EPISODE_LENGTHS, strict=True):
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
        returns_to_go = batch.window.returns_to_go[number, :size]
        np.testing.assert_array_equal(returns_to_go, dataset.returns_to_go[expected])
        for padded_with_the_last in batch.window[:5]:
            assert (padded_with_the_last[number, size:] == padded_with_the_last[number, size - 1]).all()
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
