"""What a process may use of its machine: the limits of containers and of other operating systems."""

import os

import pytest

from flowrl import machine


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


def test_other_operating_systems_have_cores_but_may_not_tell_their_memory(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf")
    assert machine.available_cores() == os.cpu_count()
    assert machine.available_memory() is None
