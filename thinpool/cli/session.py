"""What one run of a command has: the global options, the API, and the three streams.

Standard output carries the answer: text for people, or one JSON document. Standard error carries
notes, questions and progress bars. Thread-safety: one thread, but for the progress callback.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from thinpool.errors import ThinpoolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.api import Thinpool
    from thinpool.cli.settings import Settings
    from thinpool.model import Progress

    Connect = Callable[..., Thinpool]
    ProgressCallback = Callable[[Progress], None]


def connect_default(**options: Any) -> Thinpool:
    """The real API; imported when a command first needs it."""
    from thinpool.api import Thinpool

    return Thinpool(**options)


def printable(text: str) -> str:
    """A text as one line that cannot steer a terminal; what is no text shows as an escape."""
    if text.isprintable():
        return text
    return "".join(
        each
        if each.isprintable()
        else f"\\x{ord(each) - 0xDC00:02x}"
        if 0xDC80 <= ord(each) <= 0xDCFF  # noqa: PLR2004 - surrogateescape, PEP 383
        else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


class Session:
    """One run of the command line.

    Attributes:
        root: the directory of the pools as given; None for the API's default.
        timeout: seconds; None for the API's default.
        json: answer with one JSON document.
        quiet: no confirmations, warnings and progress.
        verbosity: how often ``-v`` was given.
        settings: the file of defaults, once it was read.
    """

    def __init__(self, connect: Connect = connect_default) -> None:
        """Nothing is connected yet."""
        self.root: str | None = None
        self.timeout: float | None = None
        self.json = False
        self.quiet = False
        self.verbosity = 0
        self.settings: Settings | None = None
        self._connect = connect
        self._api: Thinpool | None = None

    @property
    def api(self) -> Thinpool:
        """The API for the root that was asked for."""
        if self._api is None:
            if self.verbosity:
                self._log()
            root, timeout = self.root, self.timeout
            if self.settings is not None:
                if root is None and not os.environ.get("THINPOOL_ROOT"):
                    root = self.settings.root
                timeout = self.settings.timeout if timeout is None else timeout
            options: dict[str, Any] = {"root": root}
            if timeout is not None:
                options["timeout"] = timeout
            self._api = self._connect(**options)
        return self._api

    def _log(self) -> None:
        """Show the library's log on standard error."""
        import logging

        logging.basicConfig(
            stream=sys.stderr,
            format="%(name)s: %(message)s",
            level=logging.INFO if self.verbosity == 1 else logging.DEBUG,
        )

    # ---- standard output ------------------------------------------------------------------

    def answer(self, document: Callable[[], dict[str, Any]], text: Callable[[], str]) -> None:
        """Give the answer of a command, as asked: the document, or the text for people."""
        if self.json:
            self.write_json(document())
        else:
            self.write(text())

    def done(self, document: Callable[[], dict[str, Any]], text: Callable[[], str]) -> None:
        """Confirm that something was done; ``--quiet`` wants no confirmation."""
        if self.json or not self.quiet:
            self.answer(document, text)

    def write(self, text: str) -> None:
        """Write lines to standard output."""
        if text:
            sys.stdout.write(text if text.endswith("\n") else text + "\n")

    def write_json(self, document: dict[str, Any]) -> None:
        """Write the one JSON document: indented for a terminal, in one line otherwise."""
        import json

        indent = 2 if sys.stdout.isatty() else None
        separators = None if indent else (",", ":")
        sys.stdout.write(
            json.dumps(document, indent=indent, separators=separators, default=str) + "\n"
        )

    def refuse_json(self, command: str) -> None:
        """A stream and a document do not fit into one standard output.

        Raises:
            UsageError: ``--json`` was given.
        """
        if self.json:
            raise UsageError(
                f"{command} writes a stream to standard output and takes no --json",
                what="--json",
            )

    def refuse_terminal(self, what: str) -> None:
        """Bytes that are no text would only garble a terminal.

        Raises:
            UsageError: standard output is a terminal.
        """
        if sys.stdout.isatty():
            raise UsageError(
                f"{what} is not written to a terminal: give -o FILE, or redirect the output",
                what="-o",
            )

    # ---- standard error -------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Say something beside the answer."""
        if not self.quiet:
            sys.stderr.write(printable(text) + "\n")

    def warn(self, text: str) -> None:
        """Say what deserves attention; in JSON the document says it."""
        if not self.json:
            self.note(f"warning: {text}")

    def ask(self, question: str, *, yes: bool, refused: str) -> None:
        """Ask before something that cannot be taken back.

        Args:
            question: without the question mark's choices.
            yes: ``--yes`` was given: do not ask.
            refused: the error's text when the answer is no.

        Raises:
            UsageError: there is no terminal to ask on, and no ``--yes``.
            ThinpoolError: the answer was no.
        """
        if yes:
            return
        if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"{question} Without a terminal to ask on, say --yes", what="--yes")
        sys.stderr.write(f"{printable(question)} [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise ThinpoolError(refused)

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback | None]:
        """A progress bar on a terminal's standard error; None, and no bar, elsewhere."""
        if self.quiet or not sys.stderr.isatty() or os.environ.get("TERM") in (None, "", "dumb"):
            yield None
            return
        from thinpool.cli.progress import ProgressBar

        with ProgressBar() as bar:
            yield bar.show
