"""Train an agent on a Minari dataset, which is downloaded when first used.

python scripts/examples/train_on_minari.py mujoco/hopper/medium-v0 runs/hopper 10000
"""

import sys

import flowrl


def train_on_minari(dataset: str, run_dir: str, updates: int) -> None:
    """Train; the run folder then holds the agent, the metrics and the configuration."""
    run = flowrl.train(
        f"minari:{dataset}",
        run_dir=run_dir,
        steps=updates,
        context_length="episode",  # memory of the whole episode, at constant cost per timestep
        token_layout="fused",  # one token per timestep
        batch_size=4,
        eval_episodes=5,
    )
    for result in run.results:
        print(f"target {result.target_return:g}: mean return {result.returns.mean():.1f}")


if __name__ == "__main__":
    train_on_minari(sys.argv[1], sys.argv[2], int(sys.argv[3]))
