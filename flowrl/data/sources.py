"""What ``--dataset`` and ``--env`` name: a file in D4RL's layout, a Minari dataset, or a D4RL dataset."""

from pathlib import Path

from flowrl.data.d4rl import read_d4rl_file
from flowrl.data.episodes import EpisodeDataset
from flowrl.errors import UserError

_FILE_SUFFIXES = (".hdf5", ".h5")


def load_episodes(source: str, env: str | None = None) -> EpisodeDataset:
    """Load offline data."""
    if source.endswith(_FILE_SUFFIXES):
        return read_d4rl_file(Path(source).expanduser())
    raise UserError(f"unknown dataset '{source}'")
