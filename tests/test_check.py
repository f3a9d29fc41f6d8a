"""``flowrl check``: what it lists as used is used, and why not otherwise."""

import re

import pytest
import torch

from flowrl import check
from flowrl.check import describe_device
from flowrl.native import kernels


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", ((1, 2, 5, 64), (1, 2, 70, 64)))
    monkeypatch.setattr(kernels, "_trusted", {})


def shown():
    """What is said of each thing."""
    lines = describe_device().splitlines()
    return {line[:20].strip(): line[20:] for line in lines}


def test_everything_is_used_here():
    found = shown()
    assert f"torch {torch.__version__}" in found["software"]
    assert re.search("bfloat16: (native|emulated)", found["processor"])
    assert found["FLOWRL_KERNELS"] == "not set: kernels are on"
    assert re.fullmatch(r"[\d.e+]+ ms and [\d.e+]+ ms", found["torch"])
    error = re.search("ms, largest difference from torch (.*)", found["C++"])
    assert 0 < float(error[1]) < 1e-4
    assert found["Acting in C++"] == "used"
