"""What a process may use of its machine, within limits of containers; what ``flowrl check`` says of it."""

import os
import re

import pytest
import torch

from flowrl import check, machine
from flowrl.native import kernels


@pytest.mark.parametrize(
    ("groups", "limits", "memory"),
    [
        ("0::/a/b", {"a/memory.max": "1000", "a/b/memory.max": "max"}, 1000),
        ("0::/a/b", {"memory.max": "3000", "a/memory.max": "2000", "a/b/memory.max": "2500"}, 2000),
        ("5:cpu:/c\n4:memory:/a", {"memory/a/memory.limit_in_bytes": "1234"}, 1234),
        ("0::/", {"memory.max": "4321"}, 4321),
        ("0::/a", {}, None),
        ("0::/a", {"a/memory.max": str(1 << 62)}, None),
    ],
)
def test_memory_is_what_the_control_groups_leave(tmp_path, monkeypatch, groups, limits, memory):
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    (tmp_path / "own").write_text(f"{groups}\n")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.available_memory() == (memory or physical)


def test_memory_may_be_unknown_on_other_operating_systems(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf")
    assert machine.available_cores() == os.cpu_count()
    assert machine.available_memory() is None


def test_everything_is_used_here(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", ((1, 2, 5, 64), (1, 2, 70, 64)))
    monkeypatch.setattr(kernels, "_trusted", {})
    found = {line[:20].strip(): line[20:] for line in check.describe_device().splitlines()}
    assert f"torch {torch.__version__}" in found["software"]
    assert re.search("bfloat16: (native|emulated)", found["processor"])
    assert found["FLOWRL_KERNELS"] == "not set: kernels are on"
    assert re.fullmatch(r"[\d.e+]+ ms and [\d.e+]+ ms", found["torch"])
    error = re.search("ms, largest difference from torch (.*)", found["C++"])
    assert 0 < float(error[1]) < 1e-4
    assert found["Acting in C++"] == "used"
