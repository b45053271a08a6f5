"""What the lines of a log look like: our own and those of libraries alike, each with the request that it is about.

Modules log through `logging`, and need know nothing of this. What a line is about (`request_id`, `version`, `trace_id`) is
bound where a request is handled (serving/routes/door.py), in structlog's context variables.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Literal, TextIO

import structlog
from structlog.types import EventDict, Processor

from serving.config import ServingConfig

ROOMS = ("feedback", "serving", "learner", "deploy")
ACCESS = ("method", "route", "status", "seconds")
"""What lines of answered requests tell beside the rest; other `extra` is libraries' own, and left out."""

Process = Literal["server", "learner", "supervisor"]


def is_pretty(config: ServingConfig, stream: TextIO) -> bool:
    """Whether lines are for people."""
    return stream.isatty() if config.log_format == "auto" else config.log_format == "pretty"


def set_up_logs(
    config: ServingConfig, process: Process, stream: TextIO | None = None, *, supervised: bool = False
) -> None:
    """Have everything that this process logs written to `stream` (standard error), as the settings say.

    Libraries are heard from warnings on. Under `heed up` a line for each request would drown what people look for: they are
    written there at level debug, or as JSON.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    pretty, level = is_pretty(config, handler.stream), logging.getLevelNamesMapping()[config.log_level.upper()]
    handler.setFormatter(formatter(process, pretty=pretty, colours=pretty and handler.stream.isatty()))
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING))
    logging.captureWarnings(True)
    for room in ROOMS:
        logging.getLogger(room).setLevel(level)
    if pretty and supervised and level > logging.DEBUG:
        logging.getLogger("serving.access").setLevel(max(level, logging.WARNING))


def formatter(process: Process, *, pretty: bool, colours: bool = False) -> logging.Formatter:
    """Turns each record into a line; of an exception into its traceback, which never shows what variables held."""

    def begin(_: object, __: str, line: EventDict) -> EventDict:
        return {"timestamp": line.pop("timestamp"), "level": line.pop("level"), "process": process, **line}

    told: Sequence[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(ACCESS),
    ]
    for_people: Sequence[Processor] = [
        structlog.processors.TimeStamper("%H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(
            colors=colours,
            pad_level=False,
            exception_formatter=structlog.dev.plain_traceback,  # the default shows local variables
        ),
    ]
    for_programs: Sequence[Processor] = [
        structlog.processors.TimeStamper("iso", utc=True),
        begin,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=told,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *(for_people if pretty else for_programs),
        ],
    )
