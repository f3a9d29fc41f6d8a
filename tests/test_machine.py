"""What a process may use of its machine, within limits of containers; what ``flowrl check`` says of it."""

import os
import re

import pytest
import torch

from flowrl import check, machine
from flowrl.attention.flow import cpu
from flowrl.native import kernels
from flowrl.native.library import native_library


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


def described(monkeypatch):
    """What ``flowrl check`` prints, by the first words of its lines."""
    monkeypatch.setattr(check, "SHAPES", ((1, 2, 5, 64), (1, 2, 70, 64)))
    monkeypatch.setattr(kernels, "_trusted", {})
    return {line[:20].strip(): line[20:] for line in check.describe_device().splitlines()}


def test_everything_is_used_here(monkeypatch):
    found = described(monkeypatch)
    assert f"torch {torch.__version__}" in found["software"]
    assert re.search("bfloat16: (native|emulated)", found["processor"])
    assert found["FLOWRL_KERNELS"] == "not set: kernels are on"
    assert re.fullmatch(r"[\d.e+]+ ms and [\d.e+]+ ms", found["torch"])
    assert 0 < float(re.search("ms, largest difference from torch (.*)", found["C++"])[1]) < 1e-4
    assert found["Acting in C++"] == "used"


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("FLOWRL_KERNELS", "off", "FLOWRL_KERNELS is off"),
        ("CXX", "false", "could not be built"),
        ("CXX", 'g++ "', "there is no compiler"),
    ],
)
def test_what_is_not_used_has_its_reason(monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    libraries = (native_library, cpu.flow_library)
    for library in libraries:
        library.cache_clear()
    found = described(monkeypatch)
    for library in libraries:
        library.cache_clear()
    assert all(found[name].startswith("not used: ") for name in ("C++", "Acting in C++"))
    assert all(reason in found[name] for name in ("C++", "Acting in C++"))
