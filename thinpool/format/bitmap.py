"""A bitmap block: reference counts of 16320 blocks, two bits each."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.record import Record, u32, u64, u64s

WORDS = 510
WORD_ENTRIES = 32
OVERFLOW = 3
"""The pair that says: three or more, see the overflow tree."""

_SWAPPED = (0, 2, 1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """Counts of 0, 1, 2, or more."""

    csum: int
    padding: int
    blocknr: int
    words: tuple[int, ...]

    def count(self, entry: int) -> int:
        """0, 1, 2, or 3 for three and more."""
        word, place = divmod(entry, WORD_ENTRIES)
        return _SWAPPED[self.words[word] >> 2 * place & 3]


BITMAP = Record(
    "bitmap",
    "Bitmap block",
    Bitmap,
    u32("csum", "", "Checksum, salt 240779."),
    u32("padding", "", "Zeros."),
    u64("blocknr", "metadata block", "Its own place."),
    u64s(
        "words", WORDS, "pairs of bits", "Entry e: bits 2 (e mod 32) and the next of word e / 32."
    ),
)


def words_of(counts: list[int]) -> tuple[int, ...]:
    """The words of a bitmap of these counts; entries past the last are 0."""
    words = [0] * WORDS
    for entry, count in enumerate(counts):
        word, place = divmod(entry, WORD_ENTRIES)
        words[word] |= _SWAPPED[min(count, OVERFLOW)] << 2 * place
    return tuple(words)
