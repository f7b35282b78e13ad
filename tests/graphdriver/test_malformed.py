"""Requests that are none: each gets an error, none leaves anything, and the next one works."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest

from tests.graphdriver.kit import Connection, eventually

pytestmark = [
    pytest.mark.root,
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.ext4,
    pytest.mark.slow,
]

REQUESTS = 10_000
CALLS = (
    "Create", "CreateReadWrite", "Remove", "Get", "Put", "Exists", "Diff", "Changes", "DiffSize",
    "GetMetadata", "Init", "ApplyDiff?id=nobody&parent=", "ApplyDiff", "ApplyDiff?id=../x",
    "Nonsense", "", "Create/x", "ApplyDiff?id=" + "a" * 300,
)  # fmt: skip
VALUES = (
    None, True, 0, -1, 1e308, "", "missing", "../../etc", "a/b", "\0", "\ud800", "x" * 500, [],
    ["x"], {}, {"size": "1G"}, {"size": 3}, {"size": "-1"}, [[[]]], "nobody-init", "é", "\n",
    [None],
)  # fmt: skip
FIELDS = ("ID", "Parent", "StorageOpt", "MountLabel", "Opts", "UIDMaps", "Home", "id", "", "\0")


def a_body(rng):
    """Bytes that may or may not be JSON; never a layer that could be made."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return rng.choice([b"", b"null", b"[]", b"3", b'"x"', b"{", b"}", b"[" * 5000, b"\xff\xfe"])
    document = {rng.choice(FIELDS): rng.choice(VALUES) for _ in range(rng.randrange(5))}
    document["Parent"] = rng.choice(("missing", 3, [], {}, "../x"))  # so that none is made
    if kind != 2:
        document["Opts"] = ["nonsense"]
    body = json.dumps(document).encode()
    if kind == 3:
        return body[: rng.randrange(len(body) + 1)]
    if kind == 4:
        at = rng.randrange(len(body))
        return body[:at] + rng.randbytes(1) + body[at + 1 :]
    return body


def open_files(driver):
    return len(list(Path(f"/proc/{driver.process.pid}/fd").iterdir()))


@pytest.mark.timeout(600)
def test_ten_thousand_malformed_requests(driver, rng):
    before = open_files(driver)
    connection = Connection(driver.socket)
    for number in range(REQUESTS):
        call, body = rng.choice(CALLS), a_body(rng)
        method = rng.choice(("POST", "POST", "POST", "POST", "GET", "PUT", "DELETE"))
        connection.request(method, f"/GraphDriver.{call}", body)
        response = connection.getresponse()
        answer = response.read()
        shown = (number, method, call, body, response.status, answer[:200])
        assert response.status < 500 or call == "Diff", shown
        assert b"Traceback" not in answer, shown
        assert b"internal error" not in answer, shown
        if method != "HEAD":
            document = json.loads(answer)
            assert document.get("Err") or document in ({}, {"Exists": False}), shown
        if response.will_close:
            connection.close()
    connection.close()
    assert driver.volumes() == {"base"}
    eventually(lambda: open_files(driver) <= before + 4)
    assert "Traceback" not in driver.log.read_text()
    driver.create("fine")
    driver.remove("fine")


def test_requests_cut_off_anywhere(driver, rng):
    before = open_files(driver)
    body = json.dumps({"ID": "nobody", "Parent": "missing"}).encode()
    whole = b"".join(
        [
            b"POST /GraphDriver.Get HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\n",
            b"Content-Length: %d\r\n\r\n" % (len(body) + 100),
            body,
        ]
    )
    for _ in range(500):
        data = whole[: rng.randrange(len(whole) + 1)]
        if rng.random() < 0.2:
            data = os.urandom(rng.randrange(300)) + data
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(driver.socket))
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(data)
    assert driver.call("Plugin.Activate") == {"Implements": ["GraphDriver"]}
    eventually(lambda: open_files(driver) <= before + 4)
    assert "Traceback" not in driver.log.read_text()


def test_body_beyond_the_limit_is_refused(driver):
    status, answer = driver.request("/GraphDriver.Get", b'{"ID": "' + b"x" * (2 << 20) + b'"}')
    assert status == 413
    assert "larger than" in json.loads(answer)["Err"]
    assert driver.call("Plugin.Activate")


def test_slow_client_holds_up_nobody(driver):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(driver.socket))
        sock.sendall(b"POST /GraphDriver.Get HTTP/1.1\r\nHost: d\r\nContent-Length: 10\r\n\r\n{")
        assert driver.call("Plugin.Activate")
        assert not driver.exists("nobody")
