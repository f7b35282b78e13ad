"""Every status of the C core has its error, once."""

import ast
import inspect

import pytest

from thinpool import errors
from thinpool._native import ffi
from thinpool.engine import status as status_module
from thinpool.engine.status import STATUS_ERRORS, check, error_for, new_error

STATUSES = {name: value for value, name in ffi.typeof("enum tp_status").elements.items()}


def _keys_as_written() -> list[str]:
    """A dict display drops duplicates silently: count what stands in the source."""
    tree = ast.parse(inspect.getsource(status_module))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "STATUS_ERRORS":
            assert isinstance(node.value, ast.Dict)
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError("no STATUS_ERRORS")


@pytest.mark.parametrize("name", sorted(set(STATUSES) - {"TP_OK"}))
def test_status_is_in_the_table_exactly_once(name):
    assert _keys_as_written().count(name) == 1
    with pytest.raises(STATUS_ERRORS[name]) as caught:
        check(STATUSES[name])
    assert caught.value.attributes["status"] == name
    assert caught.value.message


def test_table_names_nothing_that_is_no_status():
    assert set(STATUS_ERRORS) == set(STATUSES) - {"TP_OK"}


def test_success_raises_nothing():
    check(0)
    check(7)


def test_details_of_the_core_become_attributes():
    err = new_error()
    err.message = b"metadata block 7: checksum 0x1, computed 0x2"
    err.block, err.found, err.wanted = 7, 1, 2
    error = error_for(STATUSES["TP_E_BLOCK_CHECKSUM"], err, path="/pool/metadata")
    assert type(error) is errors.ChecksumError
    assert error.message == "/pool/metadata: metadata block 7: checksum 0x1, computed 0x2"
    assert error.attributes == {
        "status": "TP_E_BLOCK_CHECKSUM",
        "path": "/pool/metadata",
        "block": 7,
        "found": 1,
        "wanted": 2,
    }


@pytest.mark.parametrize(
    ("name", "host_errno", "kind"),
    [
        ("TP_E_IO", 28, errors.HostSpaceError),
        ("TP_E_IO", 5, errors.StorageIOError),
        ("TP_E_OPEN", 2, errors.NotFoundError),
        ("TP_E_OPEN", 13, errors.NotPermittedError),
        ("TP_E_OPEN", 16, errors.BusyError),
    ],
)
def test_errno_of_the_host_refines_the_type(name, host_errno, kind):
    err = new_error()
    err.host_errno = host_errno
    err.block = (1 << 64) - 1
    error = error_for(STATUSES[name], err)
    assert type(error) is kind
    assert error.attributes["errno"] == host_errno
    assert "block" not in error.attributes


def test_unknown_status_is_still_an_error():
    with pytest.raises(errors.ThinpoolError) as caught:
        check(-999)
    assert caught.value.attributes["status"] == "TP_E_-999"
