"""How many cores this process may use: what it may run on, and what its container pays for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def cores(root: Path = _ROOT) -> int:
    """At least 1. A container's quota (docker --cpus, a Kubernetes limit) of 1.5 cores counts as 2.

    `root`: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of this process's cgroup and of those around it, in cores."""
    for folder in _cgroups(root):
        for name in ("cpu.max", "cpu.cfs_quota_us"):  # of cgroups 2 and 1
            try:
                quota, *period = (folder / name).read_text("ascii").split()
                microseconds = float(period[0] if period else (folder / "cpu.cfs_period_us").read_text("ascii"))
                if quota not in ("max", "-1"):
                    yield float(quota) / microseconds
            except (OSError, ValueError, ZeroDivisionError):
                continue  # another version of cgroups, or none


def _cgroups(root: Path) -> Iterator[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = mount / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))
