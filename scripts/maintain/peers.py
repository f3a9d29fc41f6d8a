"""Train d3rlpy's methods on the embedded datasets and write results that ``flowrl report`` reads beside runs.

d3rlpy requires an older Gymnasium than flowrl does, but works with the newer one:

    pip install -c constraints.txt -e ".[peers]" && pip install --no-deps d3rlpy==2.8.1

Examples:
    python scripts/maintain/peers.py --steps 100000 --seeds 0 1 2
    python scripts/maintain/peers.py --minutes 20 --methods td3bc iql --datasets hopper-medium
    python -m flowrl report runs/embedded runs/peers/*.json

Each dataset, method and seed is one file; those that are there already are not trained again.
"""

import json
import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from flowrl.atomic import write_text
from flowrl.data import EpisodeDataset
from flowrl.data.embedded import EMBEDDED, load_embedded
from flowrl.errors import UserError, did_you_mean, exit_on_user_error
from flowrl.evaluation.evaluate import evaluate

Method = Literal["td3bc", "iql", "rebrac", "dt"]

NAMES: dict[Method, str] = {
    "td3bc": "d3rlpy TD3+BC", "iql": "d3rlpy IQL", "rebrac": "d3rlpy ReBRAC",
    "dt": "d3rlpy Decision Transformer",
}  # fmt: skip
DATASETS = tuple(
    f"{robot}-{kind}"
    for robot in ("hopper", "halfcheetah", "walker2d")
    for kind in ("medium", "medium-replay", "medium-expert")
)
# ReBRAC's weights of behaviour cloning in the actor's and the critic's loss, of its paper.
# Source: Tarasov et al. 2023 (arXiv 2305.09836), as in d3rlpy's reproduction.
REBRAC_BETAS = {
    "hopper-medium": (0.01, 0.001), "hopper-medium-replay": (0.05, 0.5), "hopper-medium-expert": (0.1, 0.01),
    "halfcheetah-medium": (0.001, 0.01), "halfcheetah-medium-replay": (0.01, 0.001),
    "halfcheetah-medium-expert": (0.01, 0.1), "walker2d-medium": (0.05, 0.1),
    "walker2d-medium-replay": (0.05, 0.01), "walker2d-medium-expert": (0.01, 0.01),
}  # fmt: skip
IQL_SCHEDULE = 500_000  # steps of the cosine in d3rlpy's reproduction, where --steps does not say


@dataclass(frozen=True)
class PeersConfig:
    """Train and evaluate d3rlpy's methods with its recommended settings, for some steps or minutes."""

    steps: int | None = None
    """Gradient steps of each training."""
    minutes: float | None = None
    """Processor minutes of each training, instead of steps: other programs that run do not shorten it."""
    datasets: tuple[str, ...] = DATASETS
    """Embedded datasets."""
    methods: tuple[Method, ...] = ("td3bc", "iql", "rebrac", "dt")
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings."""
    episodes: int = 100
    """Evaluation episodes."""
    eval_seed: int = 1_000_000
    """Seed of the evaluation episodes, the same for every method."""
    device: str = "cpu:0"
    """cpu:0, cuda:0, ..."""
    output: Path = Path("runs/peers")
    """Folder of the results."""

    @property
    def budget(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.minutes:g} minutes"


class BudgetSpent(Exception):
    """Raised from a callback to end a training of d3rlpy."""


class QPolicy:
    """A batched agent of one of d3rlpy's actor-critic methods, which have no memory."""

    def __init__(self, algorithm: Any) -> None:
        self._algorithm = algorithm

    def reset(self, num_envs: int, target_return: float | np.ndarray) -> None:
        pass

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        return np.clip(self._algorithm.predict(observations.astype(np.float32)), -1, 1)

    def keep(self, indices: np.ndarray) -> None:
        pass


class DecisionTransformerPolicy:
    """A batched agent of d3rlpy's Decision Transformer, whose own wrapper acts for one environment."""

    def __init__(self, algorithm: Any) -> None:
        self._config = algorithm.config
        self._action_dim = algorithm.impl.action_size
        self._transformer = algorithm.impl.modules.transformer.eval()

    def reset(self, num_envs: int, target_return: float | np.ndarray) -> None:
        self._rest = np.broadcast_to(np.asarray(target_return, np.float32), num_envs)
        self._timestep = 0
        # One entry a timestep: observations (N, S), actions (N, A) and returns-to-go (N, 1).
        self._window: deque[list[torch.Tensor]] = deque(maxlen=self._config.context_size)

    @torch.no_grad()
    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        self._timestep += 1
        if rewards is not None:
            self._rest = self._rest - rewards.astype(np.float32)
        states = self._config.observation_scaler.transform(torch.from_numpy(observations.astype(np.float32)))
        returns_to_go = self._config.reward_scaler.transform(torch.from_numpy(self._rest.copy())[:, None])
        self._window.append([states, torch.zeros(len(states), self._action_dim), returns_to_go])
        window = [torch.stack(parts, dim=1) for parts in zip(*self._window, strict=True)]  # (N, L, ...)
        length = len(self._window)
        timesteps = torch.arange(self._timestep - length + 1, self._timestep + 1).expand(len(states), length)
        actions = self._transformer(*window, timesteps, torch.zeros(len(states), length))[:, -1]
        self._window[-1][1] = actions
        return actions.clamp(-1, 1).numpy()

    def keep(self, indices: np.ndarray) -> None:
        self._rest = self._rest[indices]
        for entry in self._window:
            entry[:] = [part[indices] for part in entry]


def run_peers(config: PeersConfig) -> None:
    """Train and evaluate everything whose file is not there.

    Raises:
        UserError: d3rlpy is not installed, not one budget, or an unknown dataset.
    """
    if (config.steps is None) == (config.minutes is None):
        raise UserError("give --steps or --minutes")
    for name in config.datasets:
        if name not in EMBEDDED:
            raise UserError(f"--datasets {name}: not an embedded dataset{did_you_mean(name, EMBEDDED)}")
    try:
        import d3rlpy
        import structlog
    except ImportError as error:
        raise UserError(f"needs d3rlpy ({error}): see the top of {Path(__file__).name}") from error
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    for seed in config.seeds:
        for name in config.datasets:
            for method in config.methods:
                budget = config.budget.replace(",", "").replace(" ", "-")
                path = config.output / f"{name}-{method}-{budget}-seed{seed}.json"
                if path.exists():
                    print(f"{path}: already there")
                    continue
                d3rlpy.seed(seed)
                document = train_and_evaluate(config, name, method, seed)
                write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
                figures = document["targets"][0]
                print(f"{path}: normalised score {figures['normalized_score_mean']:.1f}", flush=True)


def train_and_evaluate(config: PeersConfig, name: str, method: Method, seed: int) -> dict[str, Any]:
    """Return the results in the form of ``flowrl evaluate --json``.

    The Decision Transformer's target is the best return in the data, as flowrl's: d3rlpy's own are for D4RL.
    """
    dataset = load_embedded(name)
    environment = dataset.environment
    assert environment is not None
    algorithm = make_algorithm(method, name, config.steps or IQL_SCHEDULE, config.device)
    started = time.process_time()
    steps = train(algorithm, dataset, config.steps, config.minutes)
    seconds = time.process_time() - started
    policy = DecisionTransformerPolicy(algorithm) if method == "dt" else QPolicy(algorithm)
    target = float(dataset.episode_returns.max()) if method == "dt" else 0.0
    [result] = evaluate(policy, environment, (target,), config.episodes, config.eval_seed, dataset.reference)
    figures = result.to_dict() | {"target_return": target if method == "dt" else None}
    return {
        "method": f"{NAMES[method]}, {config.budget}",
        "config": {"seed": seed},
        "gradient_steps": steps,
        "processor_seconds": seconds,
        "environment": asdict(environment),
        "dataset_id": dataset.dataset_id,
        "dataset_sha256": dataset.sha256,
        "checkpoint_step": None,
        "seed": config.eval_seed,
        "versions": {package: version(package) for package in ("flowrl", "d3rlpy", "torch", "gymnasium")},
        "targets": [figures],
    }


def train(algorithm: Any, dataset: EpisodeDataset, steps: int | None, minutes: float | None) -> int:
    """Train for the budget and return the gradient steps."""
    import d3rlpy

    ends = np.zeros(dataset.num_transitions, dtype=bool)
    ends[dataset.episode_starts + dataset.episode_lengths - 1] = True
    terminals = np.zeros(dataset.num_transitions, dtype=np.float32)
    terminals[ends] = dataset.terminated
    data = d3rlpy.dataset.MDPDataset(
        observations=dataset.observations,
        actions=dataset.actions,
        rewards=dataset.rewards.astype(np.float32),
        terminals=terminals,
        timeouts=(ends & (terminals == 0)).astype(np.float32),
    )
    deadline = time.process_time() + 60 * minutes if minutes is not None else float("inf")
    done = 0

    def stop_at_end(_algorithm: Any, _epoch: int, total: int) -> None:
        nonlocal done
        done = total
        if total == steps or time.process_time() >= deadline:
            raise BudgetSpent

    with suppress(BudgetSpent):
        algorithm.fit(
            data,
            n_steps=1_000_000_000,
            n_steps_per_epoch=1_000,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
            show_progress=False,
            callback=stop_at_end,
        )
    return done


def make_algorithm(method: Method, dataset: str, schedule: int, device: str) -> Any:
    """The algorithm with the settings of d3rlpy's reproduction scripts; ``schedule`` is IQL's, in steps."""
    from d3rlpy import algos, models, optimizers, preprocessing

    scaled = {"observation_scaler": preprocessing.StandardObservationScaler()}
    config: Any
    if method == "td3bc":
        config = algos.TD3PlusBCConfig(**scaled)
    elif method == "iql":
        cosine = optimizers.CosineAnnealingLRFactory(T_max=schedule)
        config = algos.IQLConfig(
            actor_optim_factory=optimizers.AdamFactory(lr_scheduler_factory=cosine),
            reward_scaler=preprocessing.ReturnBasedRewardScaler(multiplier=1000.0),
        )
    elif method == "rebrac":
        actor_beta, critic_beta = REBRAC_BETAS[dataset]
        config = algos.ReBRACConfig(
            actor_encoder_factory=models.VectorEncoderFactory([256, 256, 256]),
            critic_encoder_factory=models.VectorEncoderFactory([256, 256, 256], use_layer_norm=True),
            actor_beta=actor_beta,
            critic_beta=critic_beta,
            **scaled,
        )
    else:
        warmup = optimizers.WarmupSchedulerFactory(warmup_steps=10_000)
        config = algos.DecisionTransformerConfig(
            optim_factory=optimizers.GPTAdamWFactory(
                weight_decay=1e-4, clip_grad_norm=0.25, lr_scheduler_factory=warmup
            ),
            encoder_factory=models.VectorEncoderFactory([128], exclude_last_activation=True),
            reward_scaler=preprocessing.MultiplyRewardScaler(0.001),
            **scaled,
        )
    return config.create(device=device)


def main() -> None:
    """Parse the command line and run; exits with 2 on bad input."""
    config = tyro.cli(PeersConfig, description=__doc__)
    with exit_on_user_error():
        run_peers(config)


if __name__ == "__main__":
    main()
