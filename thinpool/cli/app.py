"""The commands put together, and what happens around one: errors, signals, broken pipes.

Errors are one line on standard error, or ``{"error": …}`` on standard output with ``--json``.
SIGINT, SIGTERM and SIGHUP unwind the command, which undoes what it began, and end it with 130.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from thinpool.cli import exits
from thinpool.cli.command import Group
from thinpool.cli.session import Session, connect_default, printable
from thinpool.errors import InterruptedError_, ThinpoolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from thinpool.cli.session import Connect

PROGRAM: Final = "thinpool"
COMPLETE_VARIABLE: Final = "_THINPOOL_COMPLETE"
_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_AT: Final = "thinpool.cli.commands."
COMMANDS: Final = {
    "create-pool": _AT + "pools",
    "attach-pool": _AT + "pools",
    "detach-pool": _AT + "pools",
    "pools": _AT + "pools",
    "status": _AT + "pools",
    "set": _AT + "pools",
    "extend-pool": _AT + "pools",
    "remove-pool": _AT + "pools",
    "create": _AT + "volumes",
    "import": _AT + "images",
    "snapshot": _AT + "volumes",
    "commit": _AT + "images",
    "activate": _AT + "devices",
    "deactivate": _AT + "devices",
    "resume": _AT + "devices",
    "mount": _AT + "devices",
    "umount": _AT + "devices",
    "list": _AT + "volumes",
    "remove": _AT + "volumes",
    "rename": _AT + "volumes",
    "resize": _AT + "volumes",
    "trim": _AT + "devices",
    "diff": _AT + "images",
    "delta": _AT + "volumes",
    "export": _AT + "images",
    "check": _AT + "care",
    "dump": _AT + "care",
    "restore": _AT + "later",
    "repair": _AT + "later",
    "serve": _AT + "serve",
    "doctor": _AT + "care",
    "install": _AT + "host",
    "bench": _AT + "bench",
    "completion": _AT + "shells",
}


def _show_version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        from thinpool import __version__

        click.echo(f"{PROGRAM} {__version__}")
        ctx.exit()


@click.group(
    PROGRAM,
    cls=Group,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Copy-on-write block devices: pools, images as snapshots, containers as snapshots of those.

    A pool holds a base device with a filesystem; images are snapshots of it, containers are
    snapshots of images, and a block is allocated when it is first written. The pool's metadata is
    that of the Linux kernel's dm-thin.

    Pools are named POOL, everything in them POOL/NAME: letters, digits, '.', '_' and '-', not
    starting with '-' or '.', 128 at most. Sizes are written 64K, 1.5G or in bytes, in powers of
    1024. Global options work before and after the command. Defaults may stand in
    /etc/thinpool.toml. Every command can be repeated, and one that is interrupted leaves nothing
    half made.
    """


def run(arguments: Sequence[str], *, connect: Connect = connect_default) -> NoReturn:
    """Run the command line as a process: completion, streams, signals, and the exit."""
    _open_standard_streams()
    if COMPLETE_VARIABLE in os.environ:
        from thinpool.cli import completion

        sys.exit(completion.answer(cli, os.environ[COMPLETE_VARIABLE]))
    _catch_signals()
    code = main(arguments, connect=connect)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _die_of_broken_pipe()
    except OSError as error:
        _drop_standard_output()
        if code == exits.DONE:  # otherwise the reason was said, and most likely this is it
            code = _fail(Session(), PROGRAM, exits.from_os_error(error))
    _ignore_signals()  # not sooner: the reader of a pipe may take its time
    if code == exits.INTERRUPTED:
        # Where the interrupt had passed through exec(), as under a dataclass that was being made,
        # the interpreter would end by SIGINT whatever code it is given.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str], *, connect: Connect = connect_default) -> int:
    """Run one command.

    Args:
        arguments: without the program's name.
        connect: makes the API: ``Thinpool(root=…, timeout=…)``.

    Returns:
        The exit code.
    """
    session = Session(connect)
    try:
        with cli.make_context(PROGRAM, list(arguments), obj=session) as ctx:
            code = cli.invoke(ctx)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.ctx.get_help() + "\n")
        return exits.USAGE
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - a bug is one line too
        if isinstance(error, BrokenPipeError) and _standard_output_is_broken():
            _die_of_broken_pipe()
        found = _as_ours(error)
        if isinstance(found, UsageError):  # perhaps found before --json was
            session.json = session.json or _asks_for_json(arguments)
        return _fail(session, _asked(arguments), found)
    return code if isinstance(code, int) else exits.DONE


# ---- errors -------------------------------------------------------------------------------


def _fail(session: Session, asked: str, error: ThinpoolError) -> int:
    """Say what went wrong, as asked, and give its exit code."""
    bug = type(error) is ThinpoolError and error.__cause__ is not None
    if session.verbosity > (0 if bug else 1):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if session.json:
        document = {"error": error.attributes | {"type": error.kind, "message": error.message}}
        session.write_json(document)
    else:
        message = " ".join(error.message.split("\n"))
        sys.stderr.write(f"{asked}: {printable(message)}\n")
    return exits.code_of(error)


def _as_ours(error: BaseException) -> ThinpoolError:
    """Whatever ended a command, as an error of ours."""
    if isinstance(error, ThinpoolError):
        return error
    if isinstance(error, click.ClickException):
        return _usage_error(error)
    if isinstance(error, KeyboardInterrupt | click.Abort | EOFError):
        return InterruptedError_("interrupted")
    found: ThinpoolError
    if isinstance(error, OSError):
        found = exits.from_os_error(error)
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        found = ThinpoolError(f"internal error, please report it (-v shows where): {text}")
    found.__cause__ = error
    return found


def _usage_error(error: click.ClickException) -> UsageError:
    message = error.format_message().rstrip(".").replace("\n", " ")
    ctx = getattr(error, "ctx", None)
    help_of = ctx.command_path if isinstance(ctx, click.Context) else PROGRAM
    wrong = message[:1].lower() + message[1:]
    return UsageError(f"{wrong} (see {help_of} --help)", what="arguments")


def _asked(arguments: Sequence[str]) -> str:
    """``thinpool COMMAND``: in front of an error, so that a log of several says which."""
    return next((f"{PROGRAM} {each}" for each in arguments if each in COMMANDS), PROGRAM)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether ``--json`` stands among arguments that could not be parsed."""
    words = list(arguments)
    return "--json" in (words[: words.index("--")] if "--" in words else words)


# ---- the process --------------------------------------------------------------------------


def _open_standard_streams() -> None:
    """See that the three streams are there, and that what is written to one is written whole.

    A closed one must not be taken by the first file that is opened. With PYTHONUNBUFFERED the
    text layer stands on the bare descriptor, where a write may be cut short in silence.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for ever
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        sys.stdout = open(1, "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _catch_signals() -> None:
    """Unwind on the first signal, so that what was begun is undone; give up on the third."""
    count = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise KeyboardInterrupt
        if count == 2:  # noqa: PLR2004 - once more
            os.write(2, b"thinpool: undoing what was begun; once more to leave it\n")
            return
        os._exit(exits.INTERRUPTED)

    for number in _INTERRUPTS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and jobs of a shell's background
            signal.signal(number, interrupt)


def _ignore_signals() -> None:
    """What was asked is done, or was undone: a late signal changes nothing about that.

    Without it the interpreter, as it ends, would put the default back and die of it.
    """
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


def _standard_output_is_broken() -> bool:
    """Whether nobody reads what is written to standard output any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def _drop_standard_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not fail on it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _die_of_broken_pipe() -> NoReturn:
    """End as any filter does whose reader went away: in silence, by SIGPIPE."""
    _drop_standard_output()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(exits.FAILED)
