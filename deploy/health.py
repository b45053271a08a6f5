"""`python -m deploy.health`: is what this container runs alive? Ends with 0 or 1: the image's HEALTHCHECK.

One image serves, learns or does both; which it is, the container's first process says. Settings come from HEED_* variables
and heed.toml, as that process reads them: a port that a flag gave it is not known here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.door import guarded, settings
from deploy.local import answers
from learner.config import LearnerConfig


def main() -> None:
    words = Path("/proc/1/cmdline").read_text("utf-8").split("\0")
    sys.exit(0 if alive(words, settings(warn=False)) else 1)


def alive(command: Sequence[str], config: LearnerConfig) -> bool:
    """Whether the learner (`heed learn`) or the server (`heed serve`, `heed up`) answers; alive, not necessarily ready.

    True for a learner that has no port, and cannot be asked.
    """
    port = config.learner_metrics_port if "learn" in command else config.serving.port
    return port == 0 or answers(config.serving.host, port, "/health")


if __name__ == "__main__":
    guarded(main)
