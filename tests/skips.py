"""A pytest plugin for continuous integration: there, a skipped test is a test that was not run, and fails the run.

`-p tests.skips` turns it on. Excepted are tests that need an accelerator, which no machine of ours has to have.
"""

from __future__ import annotations

import pytest

EXCEPTED = ("GPU", "CUDA", "accelerator")


class NoSkips:
    """Collects skips, and fails the run at its end when there was one."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.note(report.nodeid, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.note(report.nodeid, report.longrepr)

    def note(self, nodeid: str, why: object) -> None:
        reason = str(why[2]) if isinstance(why, tuple) else str(why)
        if not any(word in reason for word in EXCEPTED):
            self.skipped.append(f"{nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.skipped and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped, which fails the run here", red=True)
            terminalreporter.write_line("\n".join(self.skipped))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(NoSkips(), "no-skips")
