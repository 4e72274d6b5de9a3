"""One thread for the whole suite: a second buys small nets nothing, and on a busy machine both wait for each other.

Where BPDIAG_BROWSER=required, as in CI, the count of browser tests is told, and one that was skipped fails the run.
"""

import pytest
import torch
from browsing import REQUIRED

torch.set_num_threads(1)
pytest.register_assert_rewrite("rule_suite")  # so that its checks say what they compared, as tests do


def _browser_tests(config, outcome):
    """The reports of browser tests with that outcome; none in a worker of xdist, which has no terminal."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    told = reporter.stats.get(outcome, []) if reporter else []
    return [report for report in told if "test_browser.py" in report.nodeid]


def pytest_sessionfinish(session):
    if REQUIRED and _browser_tests(session.config, "skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if REQUIRED:
        passed, skipped = (len(_browser_tests(config, outcome)) for outcome in ("passed", "skipped"))
        terminalreporter.write_line(f"in the browser: {passed} passed, {skipped} skipped")
