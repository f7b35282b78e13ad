"""Exit codes: one for every kind of error, on the command line and in JSON."""

from __future__ import annotations

import errno
import os

import pytest

from thinpool import errors
from thinpool.cli import exits

# As the contract has them, written out again: the table must not drift.
EXPECTED = {
    "failed": 1,
    "closed": 1,
    "device_mapper": 1,
    "io": 1,
    "limit": 1,
    "no_memory": 1,
    "server": 1,
    "usage": 2,
    "not_found": 3,
    "already_exists": 4,
    "foreign_data": 4,
    "busy": 5,
    "timeout": 5,
    "no_space": 6,
    "data_space": 6,
    "metadata_space": 6,
    "host_space": 6,
    "corrupt": 7,
    "checksum": 7,
    "unsupported_format": 7,
    "needs_check": 7,
    "transaction_id": 7,
    "pool_failed": 7,
    "archive": 7,
    "not_permitted": 8,
    "read_only": 8,
    "unsupported_host": 8,
    "not_there_yet": 9,
    "interrupted": 130,
}


def test_every_kind_of_error_has_its_exit_code():
    kinds = {kind for kind, cls in errors.by_kind().items() if cls.__module__ == errors.__name__}
    assert kinds == set(EXPECTED)
    assert dict(exits.CODES) == EXPECTED
    assert set(EXPECTED.values()) | {0} == set(exits.MEANINGS)


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_error_is_one_line_and_its_exit_code(thinpool, kind):
    error = errors.by_kind()[kind]("p/v: what is\nin the way", path="/x", block=3)
    thinpool.api.status.side_effect = error
    result = thinpool("status", "p")
    assert result.code == EXPECTED[kind]
    assert result.stdout == ""
    assert result.stderr == "thinpool status: p/v: what is in the way\n"


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_error_in_json_has_type_message_and_attributes(thinpool, kind):
    existing = {"pool": "p", "name": "v", "id": 17}
    error = errors.by_kind()[kind]("what is in the way", existing=existing, block=None)
    thinpool.api.snapshot.side_effect = error
    result = thinpool("snapshot", "p/a", "p/b", "--json")
    assert result.code == EXPECTED[kind]
    assert result.stderr == ""
    assert result.document == {
        "error": {
            "type": kind,
            "message": "what is in the way",
            "existing": existing,
            "block": None,
        }
    }


def test_attributes_never_hide_type_and_message(thinpool):
    thinpool.api.pools.side_effect = errors.BusyError("in use", type="x", holder="pid 7")
    assert thinpool("pools", "--json").document == {
        "error": {"type": "busy", "message": "in use", "holder": "pid 7"}
    }


def test_a_kind_that_a_newer_library_made_up_has_its_parents_code():
    class LeasedError(errors.BusyError):
        kind = "leased"

    class OddError(errors.ThinpoolError):
        kind = "odd"

    assert exits.code_of(LeasedError("x")) == 5
    assert exits.code_of(OddError("x")) == 1


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOENT, 3),
        (errno.EEXIST, 4),
        (errno.EBUSY, 5),
        (errno.ENOSPC, 6),
        (errno.EDQUOT, 6),
        (errno.EACCES, 8),
        (errno.EPERM, 8),
        (errno.EROFS, 8),
        (errno.EIO, 1),
        (errno.EISDIR, 1),
    ],
)
def test_errors_of_the_host_have_exit_codes_and_name_the_file(thinpool, number, code):
    thinpool.api.export.side_effect = OSError(number, "Reason", "/some/file")
    result = thinpool("export", "p/v", "-o", "/some/file")
    assert result.code == code
    assert result.stderr == f"thinpool export: /some/file: {os.strerror(number)}\n"
    document = thinpool("export", "p/v", "-o", "/some/file", "--json").document
    assert document["error"]["errno"] == number
    assert document["error"]["path"] == "/some/file"


def test_a_bug_is_one_line_and_shows_where_only_when_asked(thinpool):
    thinpool.api.pools.side_effect = KeyError("oops")
    result = thinpool("pools")
    assert result.code == 1
    assert result.stderr == (
        "thinpool pools: internal error, please report it (-v shows where): KeyError: 'oops'\n"
    )
    assert "Traceback" in thinpool("pools", "-v").stderr
    assert thinpool("pools", "--json").document["error"]["type"] == "failed"


def test_typed_errors_show_no_traceback_unless_asked_twice(thinpool):
    thinpool.api.pools.side_effect = errors.BusyError("in use")
    assert "Traceback" not in thinpool("pools", "-v").stderr
    assert "Traceback" in thinpool("pools", "-vv").stderr


def test_an_interrupt_is_130(thinpool):
    thinpool.api.check.side_effect = KeyboardInterrupt
    result = thinpool("check", "p")
    assert (result.code, result.stdout) == (130, "")
    assert result.stderr == "thinpool check: interrupted\n"
    assert thinpool("check", "p", "--json").document["error"]["type"] == "interrupted"


def test_what_a_message_carries_cannot_steer_a_terminal(thinpool):
    thinpool.api.import_image.side_effect = errors.ArchiveError(
        "member '\x1b]0;title\x07../x\udcff' tries to escape", member="x"
    )
    stderr = thinpool("import", "p/i", "a.tar").stderr
    assert stderr == ("thinpool import: member '\\x1b]0;title\\x07../x\\xff' tries to escape\n")
