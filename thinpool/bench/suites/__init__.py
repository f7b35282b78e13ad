"""The suites, by name, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from thinpool.bench.context import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One suite.

    Attributes:
        name: on the command line.
        summary: in one line.
        root: whether it needs root.
        seconds: that it may take when nothing else is asked for.
    """

    name: str
    summary: str
    root: bool
    seconds: float

    def run(self, context: Context) -> None:
        """Measure."""
        module = import_module(f"thinpool.bench.suites.{self.name.replace('-', '_')}")
        module.run(context)


SUITES: Final = {
    suite.name: suite
    for suite in (
        Suite(
            name="edits",
            summary="small edits of large files of an image, first touched by a container",
            root=True,
            seconds=1200,
        ),
        Suite(
            name="io",
            summary="fio through the engine, its null target, a loop device, qemu-storage-daemon",
            root=True,
            seconds=900,
        ),
        Suite(
            name="small-files",
            summary="many small files, and many containers that read the same ones",
            root=True,
            seconds=330,
        ),
        Suite(
            name="snapshots",
            summary="snapshots one after another, 100 at once, and in pools that hold many",
            root=True,
            seconds=150,
        ),
        Suite(
            name="core",
            summary="allocator, CRC-32C and mapping lookups against their limits",
            root=False,
            seconds=80,
        ),
        Suite(
            name="metadata",
            summary="check and delta against thin_check and thin_delta",
            root=False,
            seconds=100,
        ),
        Suite(
            name="server",
            summary="flushes, the server at rest, and removing many large volumes",
            root=True,
            seconds=120,
        ),
    )
}
