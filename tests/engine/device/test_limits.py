"""Which limit is chosen, on trees of control groups as systems have them; tests/limits has real ones."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.device.limits import MemoryLimit, best_method

MIB = 1 << 20
V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"


class Groups:
    """A tree of control groups, as a system may have it; writing to a file that is not there makes it."""

    def __init__(self, root: Path, mounts: str, own: str) -> None:
        self.root = root
        self.write("proc/self/mounts", mounts)
        self.write("proc/self/cgroup", own)

    def write(self, path: str, content: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(content)

    def divide(self, path: str, controllers: str = "cpu memory", subtree: str = "memory") -> None:
        self.write(f"{path}/cgroup.controllers", controllers)
        self.write(f"{path}/cgroup.subtree_control", subtree)


def limit(groups: Groups, limit_bytes: int = 100 * MIB) -> tuple[MemoryLimit, list[str]]:
    """And the folders that were made for it and entered."""
    made = MemoryLimit(limit_bytes, "run-1", str(groups.root))
    return made, [str(p.parent.relative_to(groups.root)) for p in groups.root.rglob("cgroup.procs")]


def test_a_delegated_group_of_version_2_is_divided(tmp_path: Path) -> None:
    groups = Groups(tmp_path, V2, "0::/user.slice/user@1000.service/app.slice/sshd.service\n")
    groups.divide("sys/fs/cgroup/user.slice/user@1000.service/app.slice")
    groups.divide("sys/fs/cgroup/user.slice/user@1000.service/app.slice/sshd.service", subtree="")
    made, folders = limit(groups)
    (folder,) = folders
    assert (made.method, folder) == ("cgroup-v2", "sys/fs/cgroup/user.slice/user@1000.service/app.slice/run-1")
    assert (tmp_path / folder / "memory.max").read_text() == str(100 * MIB)
    assert (tmp_path / folder / "memory.swap.max").read_text() == "0"
    made.enter()
    assert (tmp_path / folder / "cgroup.procs").read_text() == str(os.getpid())


def test_its_own_counters_tell_the_peak_and_the_kills(tmp_path: Path) -> None:
    groups = Groups(tmp_path, V2, "0::/\n")
    groups.divide("sys/fs/cgroup")
    made, (folder,) = limit(groups)
    groups.write(f"{folder}/memory.peak", "104857600\n")
    groups.write(f"{folder}/memory.events", "low 0\nhigh 0\nmax 38\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert made.peak() == (100 * MIB, "memory.peak")
    assert made.kills() == 1


def test_the_root_of_version_2_divides_its_memory_when_asked(tmp_path: Path) -> None:
    groups = Groups(tmp_path, V2, "0::/\n")
    groups.divide("sys/fs/cgroup", subtree="")
    limit(groups)
    assert (tmp_path / "sys/fs/cgroup/cgroup.subtree_control").read_text() == "+memory"


def test_version_1_limits_swap_with_memory(tmp_path: Path) -> None:
    mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
    groups = Groups(tmp_path, mounts, "5:cpu:/a\n4:memory:/docker/1f2e\n0::/\n")
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)  # a container sees its group as the root
    made, (folder,) = limit(groups)
    assert (made.method, folder) == ("cgroup-v1", "sys/fs/cgroup/memory/run-1")
    for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
        assert (tmp_path / folder / name).read_text() == str(100 * MIB)
    groups.write(f"{folder}/memory.max_usage_in_bytes", "123\n")
    groups.write(f"{folder}/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert made.peak() == (123, "memory.max_usage_in_bytes")
    assert made.kills() == 2


def test_a_group_without_memory_is_of_no_use(tmp_path: Path) -> None:
    """A hybrid system: version 2 is mounted, the memory is version 1's, and that is not ours."""
    groups = Groups(tmp_path, V2, "4:memory:/\n0::/\n")
    groups.divide("sys/fs/cgroup", controllers="hugetlb", subtree="")
    made, folders = limit(groups)
    assert (made.method, folders) == ("rlimit-data", [])
    assert made.kills() is None


def test_what_a_killed_supervisor_left_is_used_again(tmp_path: Path) -> None:
    groups = Groups(tmp_path, V2, "0::/\n")
    groups.divide("sys/fs/cgroup")
    (tmp_path / "sys/fs/cgroup/run-1").mkdir()
    assert limit(groups)[0].method == "cgroup-v2"


def test_without_groups_the_process_is_limited(tmp_path: Path) -> None:
    made = MemoryLimit(300 * MIB, "run-1", str(tmp_path))
    assert made.method == "rlimit-data"
    assert made.command(["engine"]) == ["engine"]
    code = "b = bytearray(1 << 29)"
    ended = subprocess.run([sys.executable, "-c", code], preexec_fn=made.enter, capture_output=True)
    assert b"MemoryError" in ended.stderr
    peak, source = made.peak()
    assert source == "ru_maxrss"
    assert (peak or 0) > MIB
    made.close()


def test_a_limit_that_may_not_be_raised_so_far_is_none(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from engine.device.limits import best_method; "
        f"resource.setrlimit(resource.RLIMIT_DATA, ({256 * MIB}, {256 * MIB})); print(best_method(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ended.stdout == "none\n"


def test_the_users_systemd_is_asked_to_show_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it exists and holds: a stand-in plays its part, since a real one needs a machine of its own."""
    fake = tmp_path / "systemd-run"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("engine.device.limits._make_v2", lambda *arguments: None)
    monkeypatch.setattr("engine.device.limits._make_v1", lambda *arguments: None)
    monkeypatch.setattr("engine.device.limits._mounts", lambda *arguments: ["/sys/fs/cgroup"])
    for answer, method in ((f"echo {100 * MIB}", "cgroup-v2"), ("echo max", "rlimit-data"), ("exit 1", "rlimit-data")):
        fake.write_text(f"#!/bin/sh\n{answer}\n")
        fake.chmod(0o755)
        made = MemoryLimit(100 * MIB, "run-1")
        assert made.method == method
        start = made.command(["python3", "-m", "engine"])
        assert (start[:3] == ["systemd-run", "--user", "--scope"]) is (method == "cgroup-v2")
        assert start[-3:] == ["python3", "-m", "engine"]


def test_this_machine_has_a_method() -> None:
    assert best_method() in ("cgroup-v2", "cgroup-v1", "rlimit-data")
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY  # it was only asked
