"""A progress bar on standard error, drawn by rich, gone when the work is."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID
    from rich.text import Text

    from thinpool import model


class _AmountColumn(ProgressColumn):
    """How much is done: bytes with their speed, other units as counts."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn(binary_units=True)
        self._speed = TransferSpeedColumn()
        self._count = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        unit = str(task.fields.get("unit", "bytes"))
        if unit != "bytes":
            return self._count.render(task).append(f" {unit}")
        return self._bytes.render(task).append(" ").append_text(self._speed.render(task))


class ProgressBar:
    """Shows what a progress callback is told. Thread-safe: the callback may come from any thread.

    Nothing is drawn before the first call, and it takes its line away when it is closed, so that
    an error or an answer stands on a clean screen.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Draw on a console, standard error's by default; it honours NO_COLOR."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _AmountColumn(),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._lock = Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """Ready to be told."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        with self._lock:
            self._closed = True
            self._progress.stop()

    def show(self, progress: model.Progress) -> None:
        """Draw how far an operation is."""
        step = progress.step or progress.operation
        with self._lock:
            if self._closed:
                return
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task(
                    escape(step), total=progress.total, unit=progress.unit
                )
            self._progress.update(
                self._task,
                description=escape(step),
                completed=progress.done,
                total=progress.total,
                unit=progress.unit,
            )
