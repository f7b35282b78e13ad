"""Tests that need device-mapper, run in a Debian kernel under QEMU and reported as our own.

Where the host's kernel has device-mapper this is not used: such tests run like any other. Where
it has not, ``tests/conftest.py`` hands each item that is marked ``dm`` to ``run_item``. The first
one of a group boots a machine (``tools/kernel-run``) in which a second pytest runs all of the
group's items that this session has selected; it writes each report as a line of JSON to a folder
that both see, and the reports are then given out item by item. So every test fails, skips and
passes under its own name, and one that did not run in the guest, for whatever reason, is an error.

A group is a folder of tests, or an ``xdist_group`` of a test's own; tests marked ``udev`` are in
another machine, with udevd. Each group pays about 12 s for the boot and for pytest's start.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

REPOSITORY = Path(__file__).resolve().parent.parent
REPORTS_VARIABLE = "THINPOOL_GUEST_REPORTS"
TIMEOUT_SECONDS = int(os.environ.get("THINPOOL_GUEST_TIMEOUT", "1500"))
TEST_TIMEOUT_SECONDS = 300  # of one test in the guest, unless it says its own
SCRATCH_BYTES = 8 << 30  # sparse; TMPDIR of the guest: an ext4, which has direct I/O and holes
OUTPUT_TAIL = 6000

# What the host's pytest is told holds in the guest too; the rest is the guest's own business.
PASSED_ON = ("PYTHONPATH", "THINPOOL_SEED", "THINPOOL_PROFILE", "THINPOOL_NATIVE", "CI")
# Needed on the host only: tests that need these and a kernel with device-mapper are not written.
NOT_IN_GUEST = {"kernel_vm", "docker", "registry", "skopeo"}

IN_GUEST = """
set -e
mkdir -p /run/scratch
mount -t ext4 /dev/vda /run/scratch
export TMPDIR=/run/scratch
exec "$@"
"""

GUESTS = pytest.StashKey[list[str]]()


class Summary:
    """A plugin of the host's pytest: a line for each guest, carried from xdist's workers."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["thinpool_guests"] = session.config.stash.get(GUESTS, [])

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        lines = getattr(node, "workeroutput", {}).get("thinpool_guests", [])
        node.config.stash.setdefault(GUESTS, []).extend(lines)

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        if lines := config.stash.get(GUESTS, []):
            terminalreporter.section("guests")
            for line in sorted(lines):
                terminalreporter.line(line)


@dataclass(frozen=True)
class Outcome:
    """What one machine had to say.

    Attributes:
        reports: of each test by its node id, in order; data that pytest can make reports from.
        tail: the end of what it printed.
        status: of the program.
        seconds: that it took.
    """

    reports: dict[str, list[dict[str, Any]]]
    tail: str
    status: int
    seconds: float


def own_id(item: pytest.Item) -> str:
    """An item's node id without the group that xdist appends to it."""
    for mark in item.iter_markers("xdist_group"):
        return item.nodeid.removesuffix(f"@{mark.args[0]}")
    return item.nodeid


def group_of(item: pytest.Item) -> str:
    """The name of the machine that an item runs in."""
    for mark in item.iter_markers("xdist_group"):
        return str(mark.args[0])
    folder = Path(item.path).resolve().parent.name
    return f"guest-{folder}{'-udev' if item.get_closest_marker('udev') else ''}"


def assign(item: pytest.Item) -> None:
    """Make an item one that runs in a guest: with its group, and without a timeout here."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    # The group's first item takes as long as all of them; the machine has a timeout of its own.
    item.add_marker(pytest.mark.timeout(0), append=False)


# ---- in the guest ---------------------------------------------------------------------------


class ReportWriter:
    """A plugin of the guest's pytest: each report as a line of JSON, written at once."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.config = config
        self.file = path.open("a", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")
        self.file.flush()

    def pytest_unconfigure(self) -> None:
        self.file.close()


def configure(config: pytest.Config) -> None:
    """Write reports where the host wants them if this is a guest, else sum guests up."""
    if path := os.environ.get(REPORTS_VARIABLE):
        config.pluginmanager.register(ReportWriter(config, Path(path)), "thinpool-guest-reports")
    else:
        config.pluginmanager.register(Summary(), "thinpool-guest-summary")


# ---- on the host ----------------------------------------------------------------------------


def _kernel_run(root: Path, share: Path, *, udev: bool) -> list[str]:
    wanted = {name for name in os.environ.get("THINPOOL_REQUIRE", "").split(",") if name}
    here = {"dm", "udev"} if udev else {"dm"}
    settings = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    settings |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONSAFEPATH": "1",
        "THINPOOL_REQUIRE": ",".join(sorted((wanted - NOT_IN_GUEST) | here)),
        REPORTS_VARIABLE: str(share / "reports"),
    }
    command = [sys.executable, str(REPOSITORY / "tools/kernel-run")]
    command += ["--timeout", str(TIMEOUT_SECONDS), "--cwd", str(root), "--share", str(share)]
    command += ["--disk", str(share.parent / "scratch"), *(["--udev"] if udev else [])]
    for name, value in settings.items():
        command += ["--env", f"{name}={value}"]
    return [
        *command, "--", "sh", "-c", IN_GUEST, "sh", sys.executable, "-m", "pytest", "-p",
        "pytest_timeout", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_SECONDS}",
        f"@{share / 'tests'}",
    ]  # fmt: skip


def run_guest(root: Path, node_ids: Sequence[str], *, udev: bool) -> Outcome:
    """Boot a machine, run these tests of a root folder in it, and collect what they reported."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tpt-guest-") as name:
        share = Path(name) / "share"
        share.mkdir()
        (share / "tests").write_text("".join(f"{node_id}\n" for node_id in node_ids))
        with (Path(name) / "scratch").open("wb") as file:
            file.truncate(SCRATCH_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", file.name], check=True)
        with (Path(name) / "output").open("w+b") as output:
            done = subprocess.run(
                _kernel_run(root, share, udev=udev),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        printed = (Path(name) / "output").read_text(errors="replace")
        lines = (share / "reports").read_text() if (share / "reports").exists() else ""
    reports: dict[str, list[dict[str, Any]]] = {}
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):  # the last one of a machine that was stopped
            data = json.loads(line)
            reports.setdefault(data["nodeid"], []).append(data)
    return Outcome(reports, printed[-OUTPUT_TAIL:], done.returncode, time.monotonic() - begin)


@functools.cache
def _outcome_of_group(session: pytest.Session, group: str) -> Outcome:
    items = [
        item for item in session.items if item.get_closest_marker("dm") and group_of(item) == group
    ]
    outcome = run_guest(
        session.config.rootpath,
        [own_id(item) for item in items],
        udev=any(item.get_closest_marker("udev") for item in items),
    )
    line = f"{group}: {len(outcome.reports)} of {len(items)} tests ran, {outcome.seconds:.0f} s"
    session.config.stash.setdefault(GUESTS, []).append(line)
    return outcome


def _is_whole(reports: list[dict[str, Any]]) -> bool:
    """Whether a test was set up, called unless that failed or skipped, and torn down."""
    phases = [data["when"] for data in reports]
    if not phases or phases[0] != "setup" or phases[-1] != "teardown":
        return False
    return "call" in phases or reports[0]["outcome"] != "passed"


def run_item(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Report what became of one item in its guest, booting it if this is its group's first."""
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    outcome = _outcome_of_group(item.session, group_of(item))
    reports = outcome.reports.get(own_id(item), [])
    for data in reports:
        report = hook.pytest_report_from_serializable(config=item.config, data=dict(data))
        report.nodeid = item.nodeid
        if isinstance(report.longrepr, list):  # of a skip: JSON has no tuples
            report.longrepr = tuple(report.longrepr)
        hook.pytest_runtest_logreport(report=report)
    if not _is_whole(reports):
        missing = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=f"the guest (status {outcome.status}) did not run this test to its end",
            when="setup",
            sections=[("the guest's output", outcome.tail)],
        )
        hook.pytest_runtest_logreport(report=missing)
    # What earlier tests set up here is taken down as after any other test.
    call = pytest.CallInfo.from_call(
        lambda: item.session._setupstate.teardown_exact(nextitem),
        when="teardown",
    )
    if call.excinfo is not None:
        hook.pytest_runtest_logreport(report=hook.pytest_runtest_makereport(item=item, call=call))
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
