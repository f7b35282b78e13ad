"""What a suite is given: where to work, where to put what it finds, and how much time is left."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from thinpool.errors import UnsupportedHostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from thinpool.bench.results import SuiteResults
    from thinpool.bench.workplace import Workplace

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run.

    Attributes:
        quick: small sizes, to see that everything works.
        repetitions: of every measurement.
        peers: names of the peers wanted, or parts of them; None for all.
        seconds: of one suite; None for as long as it takes.
    """

    quick: bool = False
    repetitions: int = 7
    peers: tuple[str, ...] | None = None
    seconds: float | None = None

    def wants(self, subject: str) -> bool:
        """Whether a subject is to be measured; thinpool always is."""
        return (
            self.peers is None
            or subject.startswith("thinpool")
            or any(each in subject for each in self.peers)
        )


class Context:
    """One suite's run.

    Attributes:
        place: where it works.
        results: what it found so far.
        options: how to run.
    """

    def __init__(
        self,
        place: Workplace,
        results: SuiteResults,
        options: Options,
        *,
        save: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """Begin the suite's time.

        Args:
            place: a workplace of its own.
            results: to be filled.
            options: how to run.
            save: puts what there is on disk.
            say: tells people what is being done.
        """
        self.place: Final = place
        self.results: Final = results
        self.options: Final = options
        self.save: Final = save
        self.say: Final = say
        self._begun = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the suite began."""
        return time.monotonic() - self._begun

    def size(self, full: T, quick: T) -> T:
        """One of two, by what was asked for."""
        return quick if self.options.quick else full

    @contextlib.contextmanager
    def case(self, name: str, *, needs: float = 0) -> Iterator[bool]:
        """Do one case and save; yields False, and notes it, where the time does not suffice.

        Args:
            name: for people, and for the list of what was left out.
            needs: seconds that it takes, roughly.
        """
        limit = self.options.seconds
        if limit is not None and self.elapsed + needs > limit:
            why = f"{self.elapsed:.0f} of {limit:.0f} s used, it takes {needs:.0f} s or so"
            self.results.left_out.append((name, why))
            yield False
            return
        self.say(name)
        gc.collect()
        gc.disable()
        try:
            yield True
        finally:
            gc.enable()
            self.save()

    def try_peer(self, subject: str, make: Callable[[], T]) -> T | None:
        """What makes a subject ready; None where it is not wanted or this host lacks it."""
        if not self.options.wants(subject):
            self.results.skip(subject, "not asked for")
            return None
        try:
            return make()
        except UnsupportedHostError as error:
            self.results.skip(subject, error.message)
            return None


def in_turns(subjects: Sequence[T], repetitions: int) -> Iterator[tuple[int, T]]:
    """Each subject once a repetition, beginning with another one each time."""
    for repetition in range(repetitions):
        turn = repetition % len(subjects) if subjects else 0
        for subject in (*subjects[turn:], *subjects[:turn]):
            yield repetition, subject
