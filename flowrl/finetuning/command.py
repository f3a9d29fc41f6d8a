"""The command line of a fine-tuning: the agent, the replay and the folder, then the loop."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from flowrl.atomic import write_text
from flowrl.data import EpisodeDataset
from flowrl.data.dataset import top_episodes
from flowrl.envs.reference_scores import reference_scores
from flowrl.errors import UserError
from flowrl.evaluation.command import acting_environment
from flowrl.finetuning.config import FinetuneConfig, parse_finetune_config, trained_with, training_of
from flowrl.finetuning.trainer import OnlineTrainer, saved_replay
from flowrl.model.agent import Agent
from flowrl.model.checkpoint import has_checkpoint, load_checkpoint
from flowrl.model.loading import load_agent, pick_device
from flowrl.process import prepare_process
from flowrl.ranks import ALONE
from flowrl.signals import StopSignals
from flowrl.training.config import FINETUNE_FILE, TrainConfig, to_yaml
from flowrl.training.run import Run, describe, run_folder
from flowrl.training.setup import load_dataset


def run_finetune(arguments: Sequence[str] | None = None) -> Run:
    """Fine-tune a run, or continue a fine-tuning, by the command line (``sys.argv`` by default).

    Raises:
        UserError: unusable input, or a folder that is in use, not empty, or damaged.
        Stopped: after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    options = parse_finetune_config(arguments)
    prepare_process()
    with StopSignals() as signals:
        device = pick_device(options.device)
        if options.resume is not None and has_checkpoint(options.resume):
            run_dir = options.resume
            training = training_of(options, run_dir)
            saved = load_checkpoint(run_dir, for_training=True)
            if saved.step > options.steps:
                raise UserError(f"--steps {options.steps}: {run_dir} has {saved.step} updates already")
            agent = load_agent(run_dir, checkpoint=saved.step)
            agent.config = replace(agent.config, targets=options.targets or agent.config.targets)
            replay, timesteps = saved_replay(saved, agent, where=f"--resume {run_dir}")
        else:
            assert options.run is not None
            run_dir = options.resume or options.run_dir or _default_folder(options.run, options.seed)
            training, timesteps = training_of(options, options.run), 0
            with signals.interruptible():  # the data may have to be collected or downloaded
                agent, replay = _start(options, training, options.run)
        with run_folder(replace(training, run_dir=run_dir), run_dir, ALONE):
            write_text(run_dir / FINETUNE_FILE, to_yaml(replace(options, run_dir=run_dir)))
            describe(replay, tqdm.write)
            trainer = OnlineTrainer(options, training, run_dir, agent, replay, timesteps, device, signals)
            results = trainer.run()
            return Run(run_dir, trainer.step, results)


def _default_folder(run: Path, seed: int) -> Path:
    run = Path(os.path.abspath(run))  # "." and ".." have no name
    return run.with_name(f"{run.name}-online-seed{seed}")


def _start(options: FinetuneConfig, training: TrainConfig, run: Path) -> tuple[Agent, EpisodeDataset]:
    """The run's agent, to act in its environment, and the best episodes of the run's data."""
    agent = load_agent(run, checkpoint=options.checkpoint)
    environment = acting_environment(agent, run, options.env, options)
    try:
        # Read as the run read it: the environment's options that are given here are for collecting.
        own = replace(trained_with(run), dataset=training.dataset)
        dataset = load_dataset(replace(own, resume=None, eval_episodes=0, keep_best=None))
    except UserError as error:
        if options.dataset:
            raise
        raise UserError(f"{error}; the data of {run} may be given by --dataset") from error
    if dataset.sha256 != agent.config.dataset_sha256:
        raise UserError(
            f"{run}: trained on {agent.config.dataset_id} (sha256 {agent.config.dataset_sha256[:12]}), but "
            f"{dataset.dataset_id} holds other data (sha256 {dataset.sha256[:12]})"
        )
    best = top_episodes(dataset, min(1.0, options.replay_timesteps / dataset.num_transitions))
    reference = options.reference() or agent.config.reference or reference_scores(environment.env_id)
    about = replace(
        agent.config,
        dataset_id=f"{dataset.dataset_id} + online",
        environment=environment,
        reference=reference,
        targets=options.targets or agent.config.targets,
        conditioning=options.conditioning or agent.config.conditioning,
        chosen_by="",
    )
    replay = replace(best, dataset_id=about.dataset_id, environment=environment, reference=reference)
    return Agent(agent.model, about, acting=training.acting), replay
