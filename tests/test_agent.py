"""Acting, slot by slot and step by step, against forward passes over the recorded history."""

from functools import partial
from typing import get_args

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_transformer import make_model, window_of

from flowrl.model import Agent, AgentConfig
from flowrl.model.transformer import MixerName

LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32)
LAYOUTS = ("interleaved", "fused")
KINDS = [(kind, 0) for kind in get_args(MixerName)] + [("flow", 3)]  # and a convolution's width


def make_agent(layout="interleaved", attention="flow", acting="recurrent", context_length=5, **options):
    """Weights are large enough that the whole history matters."""
    own = {name: options.pop(name) for name in ("reward_mode", "conditioning") if name in options}
    options = {"max_timesteps": 1000, "context_tokens": 4096, "dropout": 0.5, "noise": 0.15} | options
    model = make_model(layout, attention, dtype=torch.float32, **options)
    model.return_scale.fill_(500.0)
    model.train()  # dropout is off in acting all the same
    config = AgentConfig(model.config, context_length, full_episodes=True, targets=(300.0,), **own)
    return Agent(model, config, acting=acting)


def observation_of(seed, t):
    """What a made-up environment shows to the episode ``seed`` at step ``t``."""
    return np.random.default_rng([seed, t]).normal(size=3).astype(np.float32)


def reward_of(seed, t):
    return float(np.random.default_rng([seed, t, 1]).uniform(0, 2))


def play(agent, seed, steps, target):
    """One episode in a single slot; its actions (steps, 2)."""
    agent.reset(1, target)
    actions = []
    for t in range(steps):
        rewards = np.array([reward_of(seed, t - 1)]) if t else None
        actions.append(agent.act(observation_of(seed, t)[None], rewards)[0])
    return np.stack(actions)


def predicted(agent, seed, actions, target, start, stop):
    """The action of step ``stop - 1`` from a forward pass over the steps ``start`` to ``stop``."""
    rewards = np.array([reward_of(seed, t) for t in range(stop)], np.float64)
    returns_to_go = target - np.concatenate(([0.0], np.cumsum(rewards)[:-1]))
    previous = np.concatenate((np.zeros((1, 2), np.float32), actions[:-1]))
    observations = np.stack([observation_of(seed, t) for t in range(stop)])
    arrays = (array[None, start:stop] for array in (observations, actions, previous, returns_to_go))
    with torch.no_grad():
        output = agent.model.eval()(window_of(*arrays, start))[0].numpy()
    return LOW + (output + 1) / 2 * (HIGH - LOW)


@pytest.mark.parametrize(("attention", "convolution_width"), KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recurrent_acting_equals_the_parallel_forward(layout, attention, convolution_width):
    timesteps = 1000 if attention == "flow" else 200
    agent = make_agent(layout, attention, convolution_width=convolution_width)
    actions = play(agent, 7, timesteps, 300.0)
    assert np.abs(actions - predicted(agent, 7, actions, 300.0, 0, timesteps)).max() < 1e-4
    assert actions[timesteps // 2 :].std(axis=0).min() > 0.02


@pytest.mark.parametrize(
    ("attention", "convolution_width", "context_length"), [("flow", 0, 1), *((*kind, 5) for kind in KINDS)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_window_acting_equals_a_forward_over_the_last_timesteps(
    layout, attention, convolution_width, context_length
):
    agent = make_agent(layout, attention, "window", context_length, convolution_width=convolution_width)
    actions = play(agent, 3, 14, 300.0)
    for stop in range(1, 15):
        expected = predicted(agent, 3, actions, 300.0, max(0, stop - context_length), stop)[-1]
        assert np.abs(actions[stop - 1] - expected).max() < 1e-5
    whole = predicted(agent, 3, actions, 300.0, 0, 14)[-1]
    assert np.abs(actions[-1] - whole).max() > 1e-4  # the window is shorter than the episode


@pytest.mark.parametrize(
    ("layout", "acting", "attention", "convolution_width"),
    [
        *(("fused", "recurrent", *kind) for kind in KINDS),
        *(("interleaved", acting, "flow", 0) for acting in ("recurrent", "window")),
        ("fused", "window", "flow", 3),
    ],
)
def test_slots_restart_and_leave_without_touching_one_another(layout, acting, attention, convolution_width):
    """Slots with their own targets, restarted and dropped at will, act like agents of their own."""
    agent = make_agent(layout, attention, acting, convolution_width=convolution_width)
    targets = {0: 300.0, 1: -50.0, 2: 700.0, 3: 40.0}
    agent.reset(4, np.array(list(targets.values())))
    slots = [0, 1, 2, 3]
    episode, started = {slot: slot for slot in slots}, dict.fromkeys(slots, 0)
    played = {}
    for t in range(24):
        if t in (4, 9, 10):
            mask = {4: [1], 9: [0, 1], 10: [3]}[t]
            agent.restart(np.array([slot in mask for slot in slots]))
            for slot in mask:
                episode[slot], started[slot] = 100 + 10 * t + slot, t
        if t == 12:
            agent.keep(np.array([2, 3, 0]))
            slots = [2, 3, 0]
        if t == 18:
            agent.keep(np.array([False, True, False]))
            slots = [3]
        observations = np.stack([observation_of(episode[slot], t - started[slot]) for slot in slots])
        # The reward of a step before a restart belongs to the episode that is over.
        rewards = np.array(
            [reward_of(episode[slot], t - started[slot] - 1) if t > started[slot] else 1e3 for slot in slots]
        )
        for slot, action in zip(slots, agent.act(observations, rewards if t else None), strict=True):
            played.setdefault((slot, episode[slot]), []).append(action)
    assert sorted(len(actions) for actions in played.values()) == [3, 4, 5, 9, 9, 10, 14, 18]
    for (slot, seed), actions in played.items():
        fresh = make_agent(layout, attention, acting, convolution_width=convolution_width)
        assert np.abs(play(fresh, seed, len(actions), targets[slot]) - actions).max() < 1e-5


@pytest.mark.parametrize("acting", ["recurrent", "window"])
@pytest.mark.parametrize("option", [{"reward_mode": "delayed"}, {"conditioning": "target"}])
def test_rewards_change_nothing_where_they_are_delayed_or_the_target_alone_counts(option, acting):
    usual = make_agent(acting=acting)
    chosen = [Agent(usual.model, usual.config, acting=acting, **option)] if "conditioning" in option else []
    for agent in (make_agent(acting=acting, **option), *chosen):
        with_rewards = play(agent, 5, 10, 300.0)
        agent.reset(1, 300.0)
        without = np.stack([agent.act(observation_of(5, t)[None], np.zeros(1))[0] for t in range(10)])
        np.testing.assert_array_equal(with_rewards, without)
        assert not np.allclose(with_rewards, play(usual, 5, 10, 300.0), atol=1e-6)


def test_actions_reach_the_bounds_and_never_pass_them():
    agent = make_agent()
    with torch.no_grad():
        agent.model.predict_action.weight.mul_(1e3)
    actions = np.concatenate([play(agent, seed, 30, 300.0) for seed in range(3)])
    assert actions.dtype == np.float32
    assert (actions >= LOW).all()
    assert (actions <= HIGH).all()
    assert {tuple(row) for row in (actions == LOW) + 2 * (actions == HIGH)} >= {(1, 1), (2, 2)}


@pytest.mark.parametrize("acting", ["recurrent", "window"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_its_environment(acting, bad):
    agent = make_agent(acting=acting)
    agent.reset(3, 300.0)
    observations = np.stack([observation_of(1, slot) for slot in range(3)]).astype(np.float64)
    agent.act(observations)
    broken = observations.copy()
    broken[2, 1] = bad
    with pytest.raises(ValueError, match="observations of environment 2 is not finite"):
        agent.act(broken, np.zeros(3))
    with pytest.raises(ValueError, match="rewards of environment 1 is not finite"):
        agent.act(observations, np.array([0.0, bad, 0.0]))
    refused = agent.act(observations, np.ones(3))  # a refused step left no trace
    agent.reset(3, 300.0)
    agent.act(observations)
    assert np.array_equal(agent.act(observations, np.ones(3)), refused)


def test_calls_that_do_not_fit_are_refused():
    agent = make_agent()
    with pytest.raises(RuntimeError, match=r"call reset\(num_envs, target_return\) before act"):
        agent.act(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="'never': expected one of NextStep, SameStep, Disabled"):
        agent.reset(1, 300.0, autoreset_mode="never")
    agent.reset(2, 300.0)
    with pytest.raises(ValueError, match=r"observations has shape \(2, 4\).*\(2, 3\)"):
        agent.act(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"observations has shape \(3,\)"):
        agent.act(np.zeros(3))
    with pytest.raises(ValueError, match=r"rewards has shape \(1,\)"):
        agent.act(np.zeros((2, 3)), np.zeros(1))
    with pytest.raises(ValueError, match=r"broadcast|shape"):
        agent.reset(2, np.array([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="target_return"):
        agent.reset(2, np.array([1.0, np.nan]))


class Counter(gymnasium.Env):
    """Episodes of ``length`` timesteps whose observations and rewards are those of ``play``'s episodes."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(LOW, HIGH)

    def __init__(self, slot, length):
        self.slot, self.length, self.episode = slot, length, -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return observation_of(10 * self.slot + self.episode, 0), {}

    def step(self, action):
        reward, self.t = reward_of(10 * self.slot + self.episode, self.t), self.t + 1
        ended = self.t == self.length
        observation = observation_of(10 * self.slot + self.episode, self.t)
        return observation, reward, ended and self.slot == 0, ended and self.slot == 1, {}


@pytest.mark.parametrize("acting", ["recurrent", "window"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodes_start_anew_in_every_autoreset_mode(mode, acting):
    """Slots end after 3 and 4 timesteps; each of their episodes is acted in as by a fresh agent."""
    lengths, played = (3, 4), {}
    makers = [partial(Counter, slot, length) for slot, length in enumerate(lengths)]
    envs = SyncVectorEnv(makers, autoreset_mode=mode)
    agent = make_agent("fused", acting=acting)
    agent.reset(2, 300.0, autoreset_mode=envs.metadata["autoreset_mode"])
    observations, _ = envs.reset()
    rewards = terminations = truncations = None
    for _ in range(13):
        actions = agent.act(observations, rewards, terminations, truncations)
        over = np.zeros(2, bool) if terminations is None else terminations | truncations
        for slot, env in enumerate(envs.envs):
            if not (over[slot] and mode == AutoresetMode.NEXT_STEP):  # whose action the environment ignores
                played.setdefault((slot, env.episode), []).append(actions[slot])
        observations, rewards, terminations, truncations, _ = envs.step(actions)
        over = terminations | truncations
        if mode == AutoresetMode.DISABLED and over.any():
            observations, _ = envs.reset(options={"reset_mask": over})
    assert len(played) >= 6
    for (slot, episode), actions in played.items():
        expected = play(make_agent("fused", acting=acting), 10 * slot + episode, len(actions), 300.0)
        np.testing.assert_allclose(np.stack(actions), expected, atol=1e-5)
        assert len(actions) <= lengths[slot]


def test_a_single_environment_needs_no_batch_axis():
    expected, agent = play(make_agent(), 2, 6, 300.0), make_agent()
    agent.reset(None, 300.0)
    for t in range(6):
        action = agent.act(observation_of(2, t), reward_of(2, t - 1) if t else None, False, False)
        assert action.shape == (2,)
        np.testing.assert_allclose(action, expected[t], atol=1e-6)
    with pytest.raises(ValueError, match=r"observations has shape \(1, 3\), this agent was reset for \(3,\)"):
        agent.act(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="rewards of the last actions are needed"):
        agent.act(np.zeros(3))


def test_a_target_may_change_in_mid_episode():
    """From then on actions are those of an agent that was asked for the new return less what was earned."""
    agent = make_agent()
    agent.reset(1, 300.0)
    for t in range(3):
        agent.act(observation_of(1, t)[None], np.array([1.0]))
    agent.set_target(500.0)
    assert float(agent._returns_to_go) == pytest.approx(500.0 - 2.0)
    agent.restart(np.array([True]))
    actions = agent.act(observation_of(1, 0)[None])
    np.testing.assert_allclose(actions, play(make_agent(), 1, 1, 500.0), atol=1e-6)


def test_the_loss_of_discrete_actions_is_their_cross_entropy():
    model = make_model(dtype=torch.float32, action_choices=(3, 2))
    generator = np.random.default_rng(0)
    indices = np.stack([generator.integers(n, size=(2, 5)) for n in (3, 2)], axis=-1)
    one_hot = np.concatenate([np.eye(n)[indices[..., i]] for i, n in enumerate((3, 2))], axis=-1)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    arrays = (torch.randn(2, 5, 3), one_hot, np.roll(one_hot, 1, 1), np.ones((2, 5)))
    window = window_of(*arrays)._replace(valid=valid)
    parts, chosen = model(window)[valid].split((3, 2), dim=-1), torch.tensor(indices)[valid].T
    losses = [F.cross_entropy(part, index) for part, index in zip(parts, chosen, strict=True)]
    assert model.loss(window).item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)


@pytest.mark.parametrize("acting", ["recurrent", "window"])
@pytest.mark.parametrize("choices", [(4,), (3, 2)])
def test_discrete_actions_are_the_likeliest_choices(choices, acting):
    agent = make_agent("fused", acting=acting, action_choices=choices, noise=0.3)
    agent.reset(3, 1.0)
    observations = np.random.default_rng(0).normal(0, 4, size=(3, 5, 3))
    one_hot, seen = np.zeros((3, 5, sum(choices))), set()
    for t in range(5):
        logits = agent.model(window_of(observations, one_hot, np.roll(one_hot, 1, 1), np.ones((3, 5))))[:, t]
        likeliest = [part.argmax(-1).numpy() for part in logits.split(choices, dim=-1)]
        actions = agent.act(observations[:, t], np.zeros(3))
        np.testing.assert_array_equal(actions, likeliest[0] if len(choices) == 1 else np.stack(likeliest, 1))
        assert actions.dtype == np.int64
        one_hot[:, t] = np.hstack([np.eye(n)[chosen] for n, chosen in zip(choices, likeliest, strict=True)])
        seen |= {(part, choice) for part, chosen in enumerate(likeliest) for choice in chosen}
    assert len(seen) > len(choices)  # not always the same


def test_a_temperature_draws_from_the_softmax():
    model = make_agent(action_choices=(3,)).model
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0])
    drawn = model.to_actions(logits.expand(40_000, 3), temperature=2.0).mean(0)
    torch.testing.assert_close(drawn, (logits / 2).softmax(-1), atol=0.01, rtol=0)
