"""Manners: global options, questions, quiet, streams, signals, and how fast it starts."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest

import thinpool as package
from thinpool import errors, model
from thinpool.cli.progress import ProgressBar

REPOSITORY = Path(__file__).resolve().parents[2]

# A command line over a fake API that the test writes; run as a process of its own.
PROGRAM = """
import os, sys, time
from thinpool.cli import app
class Api:
{body}
app.run(sys.argv[1:], connect=lambda **options: Api())
"""


def program(body: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    ")),
    ]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, text=True, timeout=30, check=False, **options)


def on_terminal(
    command: list[str], typed: str = "", *, prompt: str = "", **environment: str
) -> tuple[int, str]:
    """Run a command with its three streams on a terminal: exit code, and what it showed.

    Types when it has asked: a key before that would reach a program that is still starting.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(  # noqa: S606 - our own interpreter
            command[0], command, os.environ | {"TERM": "xterm"} | environment
        )
    shown = b""
    while True:
        if typed and prompt.encode() in shown:
            os.write(terminal, typed.encode())
            typed = ""
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), shown.decode()


# ---- global options -----------------------------------------------------------------------


def test_global_options_before_and_after_reach_the_api(thinpool):
    thinpool("--root", "/r", "--timeout", "5", "list")
    assert thinpool.options == {"root": "/r", "timeout": 5.0}
    thinpool("list", "--root", "/r", "--timeout", "0.5")
    assert thinpool.options == {"root": "/r", "timeout": 0.5}
    thinpool("--root", "/a", "list", "--root", "/b")
    assert thinpool.options == {"root": "/b"}
    thinpool("--root", "/a", "list", "--timeout", "7")
    assert thinpool.options == {"root": "/a", "timeout": 7.0}
    thinpool("list")
    assert thinpool.options == {"root": None}


def test_the_environments_root_is_left_to_the_api(thinpool, monkeypatch):
    monkeypatch.setenv("THINPOOL_ROOT", "/from-environment")
    thinpool("list")
    assert thinpool.options == {"root": None}


def test_quiet_confirms_nothing_and_still_answers(thinpool):
    thinpool.api.create_pool.return_value = _with_warning()
    loud = thinpool("create-pool", "p", "--size", "1G")
    assert loud.stdout.startswith("p: 100 GiB of data")
    assert loud.stderr == "warning: the host's disk could not hold it full\n"
    quiet = thinpool("create-pool", "p", "--size", "1G", "--quiet")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")
    assert thinpool("--quiet", "activate", "p/v").stdout == "/run/thinpool/dev/p/v\n"
    assert thinpool("--quiet", "list").stdout != ""
    assert thinpool("--quiet", "create", "p/v", "--size", "1G", "--json").document["schema"] == 1


def test_warnings_stand_in_the_json_document_alone(thinpool):
    thinpool.api.status.return_value = _with_warning()
    result = thinpool("status", "p", "--json")
    assert result.stderr == ""
    assert result.document["warnings"] == ["the host's disk could not hold it full"]


def _with_warning() -> model.PoolStatus:
    return model.PoolStatus(
        pool="p",
        uuid="u",
        engine="user",
        mode="rw",
        needs_check=False,
        transaction_id=1,
        block_size=65536,
        data=model.DataSpace(path="/d", used=0, total=100 << 30, low_water=0, host_free=1),
        metadata=model.MetadataSpace(path="/m", used=0, total=1 << 30),
        when_full="queue",
        volumes=1,
        active=0,
        warnings=("the host's disk could not hold it full",),
    )


# ---- questions ----------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [True, False])
def test_a_question_without_a_terminal_is_wrong_usage(thinpool, as_json):
    result = thinpool("remove-pool", "p", *(["--json"] if as_json else []))
    assert result.code == 2
    assert "--yes" in result.stdout + result.stderr
    assert thinpool.connected == 0


REMOVE = program("def remove_pool(self, pool): print('removed it')")


@pytest.mark.parametrize(
    ("typed", "code", "says"),
    [
        ("y\n", 0, "removed it"),
        ("YES\n", 0, "removed it"),
        ("n\n", 1, "p was not removed"),
        ("\n", 1, "p was not removed"),
        ("\x04", 1, "p was not removed"),
        ("\x03", 130, "interrupted"),
    ],
)
def test_a_question_on_a_terminal_is_answered_there(typed, code, says):
    got, shown = on_terminal([*REMOVE, "remove-pool", "p"], typed, prompt="[y/N] ")
    assert "Remove pool p and everything in it? [y/N]" in shown
    assert (got, says in shown) == (code, True), shown
    assert ("removed it" in shown) is (code == 0)


# ---- streams ------------------------------------------------------------------------------


LISTS = program(
    """
    def list(self, pool, *, exclusive):
        from thinpool import model
        from datetime import datetime, UTC
        return [model.Volume(pool="p", name=f"v{n}", id=n, kind="volume", parent=None, size=1,
                mapped=0, exclusive=None, read_only=False, created=datetime.now(UTC))
                for n in range(20000)]
    def dump(self, pool, output, *, metadata):
        for n in range(200000):
            output.write(b"<device/>\\n")
    def pools(self):
        return []
    def status(self, pool):
        raise BrokenPipeError("the server's socket")
    """
)


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["dump", "p"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_it_in_silence(arguments, unbuffered):
    process = subprocess.Popen(
        [*LISTS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout.read(10) != ""
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(30) == -signal.SIGPIPE


def test_another_pipe_that_breaks_is_an_error():
    result = run([*LISTS, "status", "p"])
    assert result.returncode == 1
    assert result.stderr.startswith("thinpool status: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["list"], ["dump", "p"]])
def test_a_full_disk_under_standard_output_is_no_space(arguments):
    with Path("/dev/full").open("w") as full:
        result = run([*LISTS, *arguments], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 6
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1


def test_closed_standard_streams_are_no_error():
    command = [*LISTS, "list"]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert run(shell).returncode == 0


@pytest.mark.parametrize("arguments", [["export", "p/v"], ["export", "p/v", "--raw"]])
def test_no_tar_goes_to_a_terminal(arguments):
    body = "def export(self, *a, **k): print('exported')"
    code, shown = on_terminal([*program(body), *arguments])
    assert code == 2
    assert "not written to a terminal" in shown
    assert "exported" not in shown


def test_no_archive_is_read_from_a_terminal():
    body = "def import_image(self, *a, **k): print('imported')"
    code, shown = on_terminal([*program(body), "import", "p/i", "-"])
    assert code == 2
    assert "standard input is a terminal" in shown
    assert "imported" not in shown


# ---- progress -----------------------------------------------------------------------------


PROGRESS = program(
    """
    def export(self, volume, output, *, raw, progress):
        from thinpool import model
        print("progress" if progress else "none")
        if progress:
            for done in range(0, 101, 20):
                progress(model.Progress(operation="export", step="copying [red]files[/red]",
                         done=done << 20, total=100 << 20))
                time.sleep(0.05)
        return model.Exported(volume="p/v", output="f", written=1024)
    """
)


def test_progress_is_drawn_on_a_terminals_standard_error():
    code, shown = on_terminal([*PROGRESS, "export", "p/v", "-o", "f"])
    assert code == 0
    assert "copying [red]files[/red]" in shown
    assert "MiB" in shown
    assert "\x1b[" in shown
    assert "p/v: 1 KiB to f" in shown


def test_progress_has_no_colour_where_none_is_wanted():
    code, shown = on_terminal([*PROGRESS, "export", "p/v", "-o", "f"], NO_COLOR="1")
    assert code == 0
    assert "copying" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown)


@pytest.mark.parametrize(
    ("arguments", "environment"), [(["--quiet"], {}), ([], {"TERM": "dumb"}), ([], {"TERM": ""})]
)
def test_no_progress_where_it_is_not_wanted(arguments, environment):
    code, shown = on_terminal([*PROGRESS, "export", "p/v", "-o", "f", *arguments], **environment)
    assert code == 0
    assert "none" in shown
    assert "copying" not in shown


def test_no_progress_in_a_pipe():
    result = run([*PROGRESS, "export", "p/v", "-o", "f"])
    assert result.stdout == "none\np/v: 1 KiB to f\n"
    assert result.stderr == ""


def test_a_progress_bar_takes_other_units_and_late_calls():
    from io import StringIO  # noqa: PLC0415 - as the next

    from rich.console import Console  # noqa: PLC0415 - this test alone draws

    screen = StringIO()
    with ProgressBar(Console(file=screen, force_terminal=True, width=120)) as bar:
        for done, total in ((0, None), (5, None), (50, 100)):
            bar.show(
                model.Progress(operation="check", step="", done=done, total=total, unit="blocks")
            )
    drawn = screen.getvalue()
    bar.show(model.Progress(operation="check", step="", done=99, total=100, unit="blocks"))
    assert "check" in drawn
    assert "50/100 blocks" in drawn
    assert screen.getvalue() == drawn


# ---- signals ------------------------------------------------------------------------------


WAITS = program(
    """
    def check(self, pool, *, metadata, progress):
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.5)
            print("undone", flush=True)
    """
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_unwinds_the_command_and_ends_it_with_130(number, times):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup had us ignore it
    try:
        process = subprocess.Popen(
            [*WAITS, "check", "p"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout.readline() == "begun\n"
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.05)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == "undone\n"
    assert err.splitlines()[-1] == "thinpool check: interrupted"
    assert len(err.splitlines()) == times


def test_the_third_signal_leaves_at_once():
    body = """
    def check(self, pool, *, metadata, progress):
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            time.sleep(60)
    """
    process = subprocess.Popen(
        [*program(body), "check", "p"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    process.communicate(timeout=30)
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_changes_nothing(number):
    body = f"""
    def remove_pool(self, pool):
        import atexit
        atexit.register(os.kill, os.getpid(), {int(number)})
    """
    result = run([*program(body), "remove-pool", "p", "--yes"])
    assert (result.returncode, result.stdout, result.stderr) == (0, "p: removed\n", "")


def test_an_interrupt_that_is_ignored_stays_so():
    body = """
    def pools(self):
        import signal
        print("begun", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        return []
    """
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *program(body), "pools"]
    result = run(shell)
    assert (result.returncode, result.stdout) == (0, "begun\n")


def test_an_interrupt_in_json_is_a_document():
    process = subprocess.Popen(
        [*WAITS, "check", "p", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert json.loads(out.removeprefix("undone\n"))["error"]["type"] == "interrupted"
    assert (process.returncode, err) == (130, "")


# ---- the start ----------------------------------------------------------------------------


SLOW = ("rich", "aiohttp", "asyncio", "cffi", "construct", "zstandard", "pyudev", "sqlite3", "ssl")
OURS = ("thinpool.api", "thinpool.model", "thinpool._native", "thinpool.engine", "thinpool.server")


@pytest.mark.parametrize(
    ("run_it", "forbidden"),
    [
        ("sys.argv[1:] = ['--version']; main.run()", (*SLOW, *OURS, "click")),
        ("sys.argv[1:] = ['--help']; main.run()", (*SLOW, *OURS)),
        ("sys.argv[1:] = ['create', 'p']; main.run()", (*SLOW, *OURS)),
        ("os.environ['_THINPOOL_COMPLETE'] = 'bash_complete'; main.run()", (*SLOW, *OURS)),
        ("import thinpool", (*SLOW, *OURS)),
        ("import thinpool.cli.app", (*SLOW, *OURS)),
    ],
)
def test_nothing_slow_is_imported_before_it_is_needed(run_it, forbidden):
    code = (
        "import os, sys\nfrom thinpool.cli import main\n"
        f"try:\n    {run_it}\nexcept SystemExit: pass\n"
        f"print([name for name in {forbidden!r} if name in sys.modules], file=sys.stderr)"
    )
    environment = os.environ | {"COMP_WORDS": "thinpool status ", "COMP_CWORD": "2"}
    result = run([sys.executable, "-c", code], env=environment)
    assert result.stderr.splitlines()[-1] == "[]"


def test_version_and_completion_answer_within_a_tenth_of_a_second(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    } | {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONPYCACHEPREFIX": str(tmp_path),  # compiled once, as an installed program is
    }
    tab = {"_THINPOOL_COMPLETE": "bash_complete", "COMP_WORDS": "thinpool a", "COMP_CWORD": "1"}

    def fastest(arguments, **more):
        """Of a dozen runs; in processor time, which is what it takes on a host that is free."""
        times = []
        for _ in range(12):
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment | more,
                stdout=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            times.append(usage.ru_utime + usage.ru_stime)
        return min(times)

    nothing = fastest(["-c", "pass"])
    assert fastest(["-m", "thinpool", "--version"]) - nothing < 0.1
    assert fastest(["-m", "thinpool"], **tab) - nothing < 0.1


def test_the_version_is_the_same_everywhere():
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert package.__version__ == declared
    assert f"version: '{declared}'" in (REPOSITORY / "meson.build").read_text()
    for arguments in (["--version"], ["--quiet", "--version"]):
        result = run([sys.executable, "-m", "thinpool", *arguments])
        assert (result.returncode, result.stdout) == (0, f"thinpool {declared}\n")


def test_python_m_thinpool_is_the_command_line(tmp_path):
    result = run(
        [sys.executable, "-m", "thinpool", "--root", str(tmp_path), "create", "p", "--size", "1G"]
    )
    assert result.returncode == 2
    assert result.stderr.startswith("thinpool create: ")


def test_errors_are_typed_for_those_who_import_them():
    assert issubclass(errors.TimeoutError_, errors.BusyError)
