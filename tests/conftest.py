"""Claims: tests that are rows of `make prove`, and where their figures are kept."""

import datetime
import os
import signal
import sys
from pathlib import Path

import pytest

# Helpers that need nothing but the extensions, for all tests.
sys.path[:0] = [str(Path(__file__).parent / "ext"), str(Path(__file__).parent)]

_FIGURES = pytest.StashKey[list[str]]()
_ROWS = pytest.StashKey[dict[str, tuple[str, str, str]]]()

_HEAD = ["| claim | figure | | on |", "|---|---|---|---|"]


class Prove:
    """What a test that proves a claim reports.

    Attributes:
        full: True in `make prove`: run the full size instead of the small one.
    """

    def __init__(self, full: bool, figures: list[str]) -> None:
        self.full = full
        self._figures = figures

    def figure(self, text: str) -> None:
        """Report a figure; call it before the assertion that may fail."""
        self._figures.append(text)

    def missing(self, tool: str) -> None:
        """End the test: it cannot be measured without this tool."""
        self._figures.append("not measured")
        pytest.skip(f"{tool} is not installed")


def pytest_addoption(parser):
    parser.addoption("--prove", action="store_true", help="run every claim at full size")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Half as many again as there are cores, for tests that wait for processes use none."""
    cores = os.cpu_count() or 1
    return cores + cores // 2


def pytest_configure(config):
    config.stash[_ROWS] = {}
    # A shell ignores Ctrl-C for what it starts in the background, and so would what tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    proving = config.getoption("--prove")
    keep, drop = [], []
    for item in items:
        is_claim = item.get_closest_marker("claim") is not None
        is_full = item.get_closest_marker("full_only") is not None
        (keep if (is_claim if proving else not is_full) else drop).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


@pytest.fixture
def prove(request):
    figures = request.node.stash.setdefault(_FIGURES, [])
    return Prove(request.config.getoption("--prove"), figures)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    claim = item.get_closest_marker("claim")
    if claim is not None and (report.when == "call" or report.outcome != "passed"):
        verdict = {"passed": "holds", "failed": "DOES NOT HOLD"}.get(report.outcome, "not measured")
        figure = "; ".join(item.stash.get(_FIGURES, [])) or "-"
        item.config.stash[_ROWS][item.nodeid] = (claim.args[0], figure, verdict)
    # Halves of surrogate pairs, which some tests log, cannot be sent between processes.
    report.sections = [(name, _writable(text)) for name, text in report.sections]
    if os.environ.get("MUSET_FORBID_SKIPS") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be missing: {report.longrepr}"
    return report


def _writable(text):
    return text.encode("utf-8", "backslashreplace").decode()


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS].values()
    if not config.getoption("--prove"):
        return
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [f"| {claim} | {figure} | {verdict} | {today} |" for claim, figure, verdict in rows]
    terminalreporter.section("what holds")
    terminalreporter.write_line("\n".join([*_HEAD, *lines]))
    page = Path(__file__).parents[1] / "docs" / "proof.md"
    if config.args != ["tests"]:
        # A part of the claims: the rows of the others stay, with their dates.
        claims = {claim for claim, _, _ in rows}
        old = [row for row in page.read_text(encoding="utf-8").splitlines() if row[:2] == "| "]
        lines = [row for row in old[1:] if row[2:].split(" | ")[0] not in claims] + lines
    text = f"# Proof\n\nThe last run of each claim by `make prove`, on {os.cpu_count()} cores.\n\n"
    page.write_text(text + "\n".join([*_HEAD, *lines]) + "\n", encoding="utf-8")
