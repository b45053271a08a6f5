"""Cores are counted by what a container may use, not by what its host has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serving.cores import cores


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("quota", "expected"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_container_s_quota(root: Path, quota: str, expected: int):
    put(root / "proc/self/cgroup", "0::/\n")
    put(root / "sys/fs/cgroup/cpu.max", quota)
    assert cores(root) == expected


def test_the_smallest_of_the_quotas_around_counts(root: Path):
    put(root / "proc/self/cgroup", "0::/kubepods/pod7/box\n")
    put(root / "sys/fs/cgroup/kubepods/cpu.max", "800000 100000")
    put(root / "sys/fs/cgroup/kubepods/pod7/cpu.max", "300000 100000")
    put(root / "sys/fs/cgroup/kubepods/pod7/box/cpu.max", "max 100000")
    assert cores(root) == 3


def test_the_first_version_of_cgroups(root: Path):
    put(root / "proc/self/cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n")
    put(root / "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us", "400000\n")
    put(root / "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    put(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    put(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cores(root) == 4


@pytest.mark.parametrize("text", ["", "max 100000", "rubbish", "100000 0"])
def test_without_a_quota_all_that_it_may_run_on(root: Path, text: str):
    put(root / "proc/self/cgroup", "0::/\n")
    put(root / "sys/fs/cgroup/cpu.max", text)
    assert cores(root) == 64


def test_here_there_is_at_least_one():
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
