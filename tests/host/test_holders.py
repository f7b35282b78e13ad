"""What keeps a device busy, told in a line that can be read."""

from __future__ import annotations

from thinpool.host.holders import Holder, describe


def opened(where: str, pid: int) -> Holder:
    return Holder(how="open", pid=pid, name="sh", where=where)


def test_nobody_is_none():
    assert describe([]) is None


def test_a_few_are_all_named_and_none_twice():
    mounted = Holder(how="mount", pid=1, name="init", where="mounted on /mnt")
    twice = opened("/mnt/f", 7)
    assert describe([mounted, twice, twice]) == "mounted on /mnt; /mnt/f is open by process 7 (sh)"


def test_many_are_counted():
    told = describe([opened(f"/mnt/{number}", number) for number in range(30)])
    assert told is not None
    assert told.count("is open by process") == 4
    assert told.endswith("; and 26 more")
