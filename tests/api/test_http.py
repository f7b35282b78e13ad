"""What a pool's server and its clients read of HTTP, and what they refuse."""

import contextlib
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from thinpool.server import http, protocol
from thinpool.server.http_server import HttpServer


@pytest.fixture
def framed():
    """Makes a stream that reads these bytes, each part by itself, and then the end."""
    with contextlib.ExitStack() as stack:

        def make(*parts):
            ours, theirs = socket.socketpair()
            stack.enter_context(ours).settimeout(10)

            def send():
                with theirs, contextlib.suppress(OSError):
                    for part in parts:
                        theirs.sendall(part)
                        time.sleep(0.01)

            thread = threading.Thread(target=send)
            thread.start()
            stack.callback(thread.join)
            return http.Stream(ours)

        yield make


def test_a_message_is_read_however_it_is_cut(framed):
    message = b"POST /v1/x HTTP/1.1\r\nContent-Length: 5\r\nA-b:  c \r\n\r\nhello"
    for cut in range(1, len(message), 7):
        stream = framed(message[:cut], message[cut:] + b"GET /")
        head = stream.head()
        assert head.first == "POST /v1/x HTTP/1.1"
        assert head.fields == {"content-length": "5", "a-b": "c"}
        assert stream.exactly(head.length(largest=5)) == b"hello"
        with pytest.raises(ConnectionResetError):
            stream.head()


def test_the_end_between_messages_is_no_error(framed):
    assert framed().head() is None


def test_chunks_and_the_lines_in_them_are_read_however_they_are_cut(framed):
    body = http.chunk(b'{"a": 1}\n{"b"') + http.chunk(b': 2}\n{"c": 3}') + http.chunk(b"")
    for cut in range(1, len(body), 5):
        lines = list(framed(body[:cut], body[cut:]).lines())
        assert [json.loads(line) for line in lines] == [{"a": 1}, {"b": 2}, {"c": 3}]


@pytest.mark.parametrize("body", [b"x\r\n", b"-1\r\n", b"5\r\nhello!\r\n0\r\n\r\n", b"\r\n"])
def test_malformed_chunks_are_refused(framed, body):
    with pytest.raises(http.MalformedError):
        list(framed(body).lines())


def test_an_answer_that_breaks_off_is_no_answer(framed):
    with pytest.raises(ConnectionResetError):
        framed(b"only this").exactly(20)
    with pytest.raises(ConnectionResetError):
        list(framed(b"20\r\nless than that").lines())
    with pytest.raises(http.MalformedError):
        http.parse_status(http.Head(b"SSH-2.0-OpenSSH"))


@pytest.mark.parametrize("count", [0, 1, 256, 257, 1000])
def test_a_list_is_encoded_as_one_document_however_long_it_is(count):
    document = {"result": [{"id": each, "name": f"ä{each}"} for each in range(count)]}
    assert json.loads(http.encoded(document)) == document
    other = {"error": {"result": list(range(count))}}
    assert json.loads(http.encoded(other)) == other


@pytest.fixture
def served(tmp_path):
    """A server that tells what it was asked, and waits where it is told to."""
    gate = threading.Event()
    raw = []

    def handle(request):
        if request.path == "/wait":
            assert gate.wait(20)
        if request.path == "/fail":
            raise RuntimeError("as it was told to")
        if request.path == "/take":
            with request.take() as sock:
                sock.sendall(b"taken")
            return
        if request.path == "/stream":
            sock = request.begin_stream()
            for number in range(3):
                sock.sendall(http.chunk(b"%d\n" % number))
            sock.sendall(http.chunk(b""))
            return
        request.answer({"path": request.path, "body": request.body.decode()})

    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        server = HttpServer(listener, handle=handle, raw=raw.append)
        server.start()

        def connect():
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(20)
            sock.connect(path)
            return sock

        connect.gate, connect.raw, connect.server = gate, raw, server
        yield connect
        gate.set()
        with contextlib.suppress(ValueError, OSError):  # a test has ended it
            server.end(seconds=10)


def ask(sock, path="/x", body=b"", **fields):
    sock.sendall(http.request("POST", path, body, fields))
    return read(http.Stream(sock))


def read(stream):
    head = stream.head()
    if head is None:
        return None
    return http.parse_status(head), json.loads(stream.exactly(head.length(largest=1 << 30)))


def test_requests_on_one_connection_are_answered_in_turn(served):
    with served() as sock:
        for number in range(5):
            body = os.urandom(3).hex().encode() * (1 + 50_000 * number)
            assert ask(sock, f"/{number}", body) == (
                200,
                {"path": f"/{number}", "body": body.decode()},
            )
        # Two that come at once.
        sock.sendall(http.request("POST", "/a", b"1", {}) + http.request("POST", "/b", b"2", {}))
        stream = http.Stream(sock)
        assert [read(stream)[1]["path"] for _ in range(2)] == ["/a", "/b"]


def test_more_clients_than_threads_are_all_answered(served):
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(80) as threads:
        socks = [stack.enter_context(served()) for _ in range(80)]
        waiting = [threads.submit(ask, sock, "/wait") for sock in socks]
        time.sleep(0.3)
        assert not any(each.done() for each in waiting)
        served.gate.set()
        assert {each.result(20)[0] for each in waiting} == {200}
    assert len(served.server._threads) <= 32


def test_idle_connections_keep_nobody_from_being_answered(served):
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            sock = stack.enter_context(served())
            sock.sendall(b"")
        slow = stack.enter_context(served())
        slow.sendall(b"PO")  # and no more
        with served() as sock:
            assert ask(sock)[0] == 200
        slow.sendall(b"ST /slow HTTP/1.1\r\n\r\n")
        assert read(http.Stream(slow))[1]["path"] == "/slow"


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nno field\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 413),
        (b"POST /x HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (protocol.MAX_BODY + 1), 413),
        (b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /x HTTP/1.1\r\nA: " + b"x" * (80 << 10) + b"\r\n", 431),
    ],
)
def test_malformed_requests_are_refused_and_the_connection_closed(served, message, status):
    with served() as sock:
        sock.sendall(message)
        stream = http.Stream(sock)
        found, document = read(stream)
        assert found == status
        assert document["error"]["type"] == "UsageError"
        with contextlib.suppress(ConnectionResetError):
            assert stream.head() is None
    with served() as sock:
        assert ask(sock)[0] == 200


def test_a_connection_closes_when_the_client_says_so(served):
    with served() as sock:
        sock.sendall(b"GET /x HTTP/1.0\r\n\r\n")
        stream = http.Stream(sock)
        assert read(stream)[0] == 200
        assert stream.head() is None
    with served() as sock:
        assert ask(sock, Connection="close")[0] == 200
        assert sock.recv(1) == b""


def test_a_client_that_asks_before_it_sends_much_is_told_to_go_on(served):
    with served() as sock:
        sock.sendall(b"POST /x HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        stream = http.Stream(sock)
        assert http.parse_status(stream.head()) == 100
        sock.sendall(b"ab")
        assert read(stream)[1]["body"] == "ab"


def test_a_handler_that_fails_ends_its_connection_and_no_other(served):
    with served() as first, served() as second:
        first.sendall(http.request("POST", "/fail", b"", {}))
        assert first.recv(1) == b""
        for _ in range(5):
            assert ask(second)[0] == 200


def test_connections_are_taken_streamed_to_and_begun_raw(served):
    with served() as sock:
        sock.sendall(http.request("POST", "/take", b"", {}))
        assert sock.makefile("rb").read() == b"taken"
    with served() as sock:
        sock.sendall(http.request("POST", "/stream", b"", {}))
        stream = http.Stream(sock)
        assert stream.head().is_chunked
        assert list(stream.lines()) == [b"0", b"1", b"2"]
        assert sock.recv(1) == b""
    with served() as sock:
        sock.sendall(protocol.RAW_MAGIC + b"rest")
        deadline = time.monotonic() + 10
        while not served.raw:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with served.raw[0] as taken:
            assert taken.recv(100) == protocol.RAW_MAGIC + b"rest"
            # Reads of a channel wait for ever again.
            assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)


def test_what_is_being_done_is_answered_before_the_end(served):
    with served() as busy, served() as idle, ThreadPoolExecutor(2) as threads:
        assert ask(idle)[0] == 200
        answer = threads.submit(ask, busy, "/wait")
        time.sleep(0.2)
        ended = threads.submit(served.server.end, seconds=10)
        time.sleep(0.2)
        assert not ended.done()
        served.gate.set()
        assert answer.result(10)[0] == 200
        ended.result(10)
        assert idle.recv(1) == b""
        assert busy.recv(1) == b""


def test_the_end_does_not_wait_for_ever_for_what_takes_long(served):
    with served() as busy:
        busy.sendall(http.request("POST", "/wait", b"", {}))
        time.sleep(0.2)
        begun = time.monotonic()
        served.server.end(seconds=0.3)
        assert time.monotonic() - begun < 5
        assert busy.recv(1) == b""
