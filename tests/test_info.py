"""What ``flowrl info`` prints about a dataset."""

import numpy as np
import pytest
from conftest import EPISODE_LENGTHS

from flowrl.__main__ import main
from flowrl.data.d4rl import read_d4rl_file


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["info", *words]) == 0
    output = capsys.readouterr().out
    assert output.isascii()
    return dict(line.split(maxsplit=1) for line in output.splitlines())


def test_a_dataset_is_described(tiny_dataset, capsys):
    returns = read_d4rl_file(tiny_dataset).episode_returns
    lines = lines_of(capsys, str(tiny_dataset), "--env", "Hopper-v4")
    assert (lines["dataset"], lines["transitions"]) == ("file:tiny.hdf5", "60")
    assert lines["episodes"] == "5, 3 of them terminated"
    assert lines["lengths"] == f"from 1 to 30, median 9, mean {np.mean(EPISODE_LENGTHS):g}"
    middle = f"median {np.median(returns):.6g}, mean {returns.mean():.6g}"
    assert lines["returns"] == f"from {returns.min():.6g} to {returns.max():.6g}, {middle}"
    assert lines["observations"].endswith("1 of them constant")
    assert lines["environment"] == "Hopper-v4"
    assert lines["normalised"].endswith("returns of -20.2723 and 3234.3 are 0 and 100")
    assert "refused" not in lines


def test_bad_options_are_named(tiny_dataset, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["info", str(tiny_dataset), "--max-episode-steps", "0"])
    assert "--max-episode-steps 0" in capsys.readouterr().err
