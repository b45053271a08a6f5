"""The learner as a process: its lock, its signals, its place behind the server, its metrics, and what it leans on."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from prometheus_client import disable_created_metrics
from rich.console import Console

from feedback.board import open_board
from feedback.events import EXCHANGES, RELEASES
from feedback.keeping import Keep
from feedback.log import Log, LogUnavailable, open_log
from learner.board import LearnersBoard
from learner.config import LearnerConfig
from learner.metrics import LearnerMetrics, MetricsServer
from learner.state import State
from learner.statefile import StateError, remove_state
from learner.stopping import Stopped, Stopping
from learner.watching import Lines, LiveTable, Watcher
from serving.cores import cores
from serving.exits import Exit

LOCK_POLL_S = 0.5
LONGEST_WAIT_S = 30.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


def learn(config: LearnerConfig, until_idle: bool = False, rebuild: bool = False) -> int:
    """Learn until a signal, or until there is nothing to do; returns the exit code (serving/exits.py).

    `rebuild` makes the state anew from the log first. A fault that stops the start is one line on standard error.
    Only for the main thread of a process.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they double what is scraped and say nothing
    stopping = Stopping()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_stopped_by_signals(stopping))
            return _learn(config, until_idle, rebuild, stopping, stack)
    except Stopped:
        return Exit.DONE
    except _Refused as refused:
        sys.stderr.write(f"heed: {refused}\n")
        return refused.exit_code


class _Refused(Exception):
    """The start cannot succeed as things are; the message is one line."""

    def __init__(self, message: str, exit_code: Exit) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _learn(
    config: LearnerConfig, until_idle: bool, rebuild: bool, stopping: Stopping, stack: contextlib.ExitStack
) -> int:
    data, policy = config.serving.feedback.data, config.serving.feedback.policy
    watchers = _watchers(config)
    try:
        _hold_lock(data, "this data folder", stopping, stack)
    except OSError as error:
        raise _Refused(f"the data folder cannot be used: {error} (HEED_DATA={data})", Exit.DATA) from error
    # the store too: a learner of another data folder would publish over this one's versions, and release over its releases
    store_folder = config.serving.adapter_root / policy
    _patiently(lambda: _hold_lock(store_folder, f"policy {policy}", stopping, stack), stopping)
    metrics = LearnerMetrics(config.kl_limit)
    _serve_metrics(config, metrics, stack)
    stand_behind_the_server(config.nice)

    # Only now, because it takes seconds: a taken port or a second learner is told at once.
    import torch

    from learner.loop import Learner
    from learner.trainer import Trainer
    from serving.adapters import AdapterStore
    from serving.engine import ModelError

    torch.set_num_threads(config.learner_threads or min(torch.get_num_threads(), cores()))
    log = _patiently(lambda: open_log(config.serving.feedback, writes={RELEASES}), stopping)
    stack.callback(log.close)
    board = LearnersBoard(open_board(config.serving.feedback, "learner"))
    stack.callback(board.close)
    try:
        trainer = Trainer(config)
    except ModelError as error:
        raise _Refused(str(error), Exit.MODEL) from error
    if rebuild:
        _patiently(lambda: _must_answer(log), stopping)  # else there would be nothing to make the state anew from
    state = _open_state(config, trainer.base.fingerprint, rebuild, stopping)
    stack.callback(state.close)
    store = AdapterStore(config.serving.adapter_root, policy)
    learner = Learner(
        config,
        log=log,
        board=board,
        store=store,
        state=state,
        trainer=trainer,
        metrics=metrics,
        stopping=stopping,
        watchers=watchers,
    )
    stack.callback(learner.notices.over)
    _log.info("learning for policy %s in %s", store.policy, data)
    learner.run(until_idle)
    _log.info("stopped" if stopping.is_set() else "nothing to learn now")
    return Exit.DONE


def _watchers(config: LearnerConfig) -> list[Watcher]:
    """Who is shown how an update goes. Raises SettingError."""
    if config.probes is not None:
        from learner.probes import read_probes

        read_probes(config.probes)  # what is wrong is told at once, not after the model is loaded
    console = Console()
    watchers: list[Watcher] = [LiveTable(console) if console.is_terminal else Lines()]
    if config.tensorboard is not None:
        from learner.tensorboard import TensorBoard

        watchers.append(TensorBoard(config.tensorboard))
    return watchers


def stand_behind_the_server(nice: int) -> None:
    """Take a niceness, unless this process is nicer already. Threads started from here on inherit it."""
    if os.getpriority(os.PRIO_PROCESS, 0) < nice:
        os.setpriority(os.PRIO_PROCESS, 0, nice)


@contextlib.contextmanager
def _stopped_by_signals(stopping: Stopping) -> Iterator[None]:
    """SIGTERM and SIGINT stop the learner. Handlers of our own: a background job starts with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, stopping.on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hold_lock(folder: Path, whose: str, stopping: Stopping, stack: contextlib.ExitStack) -> None:
    """Hold the lock of a folder's one learner while this process lives, once its holder has ended. Raises OSError, Stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((folder / "learner.lock").open("a+"))
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not told:
                file.seek(0)
                holder = file.read().strip() or "(unknown)"
                _log.warning("waiting: the learner of %s is process %s", whose, holder)
                told = True
        if stopping.wait(LOCK_POLL_S):
            raise Stopped
    with contextlib.suppress(OSError):  # who it is, for the line above only; a full disk may refuse it
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _serve_metrics(config: LearnerConfig, metrics: LearnerMetrics, stack: contextlib.ExitStack) -> None:
    host, port = config.serving.host, config.learner_metrics_port
    if port == 0:
        return
    policy = config.serving.feedback.policy
    try:
        server = MetricsServer(host, port, metrics, health=lambda: {"status": "ok", "policy": policy})
    except OSError as error:
        raise _Refused(
            f"HEED_LEARNER_METRICS_PORT={port}: cannot listen on {host}:{port} ({error.strerror}). "
            "Choose another port, or 0 for none.",
            Exit.PORT,
        ) from error
    stack.callback(server.close)


def _open_state(config: LearnerConfig, base: str, rebuild: bool, stopping: Stopping) -> State:
    path = config.folder / "state.db"
    if rebuild:
        _patiently(lambda: remove_state(path), stopping)
    policy, keep = config.serving.feedback.policy, Keep.of(config.state_keep_days, config.state_keep_mb)
    try:
        return _patiently(
            lambda: State(path, policy=policy, base=base, keep=keep, weightless=config.weightless), stopping
        )
    except StateError as error:
        raise _Refused(str(error), Exit.FAILED) from error


def _must_answer(log: Log) -> None:
    """Raises LogUnavailable while the log cannot be reached."""
    log.end(EXCHANGES)
    if log.away():
        raise LogUnavailable("the log does not answer, and the state is to be made anew from it")


def _patiently(opening: Callable[[], T], stopping: Stopping) -> T:
    """What `opening` gives, once it gives it. Raises Stopped."""
    wait_s = 0.5
    while True:
        try:
            return opening()
        except (LogUnavailable, OSError, sqlite3.OperationalError) as error:
            _log.warning("waiting, and trying again in %g s: %s", wait_s, error)
        if stopping.wait(wait_s):
            raise Stopped
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
