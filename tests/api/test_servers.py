"""Servers come and go, and their clients do not notice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thinpool import Thinpool, errors
from thinpool.engine import BlockDevice
from thinpool.server.client import PoolClient, connect

MIB = 1 << 20


def supervisor(root, pool="p"):
    return int((root / "pools" / pool / "supervisor.pid").read_text())


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_many_clients_start_one_server(api, pool, root):
    PoolClient(root, "p", timeout=20).stop_server()
    with ThreadPoolExecutor(6) as threads:
        pids = set(
            threads.map(lambda _: Thinpool(root, timeout=30).status("p").server_pid, range(6))
        )
    assert len(pids) == 1


def switches(pid):
    """How often each thread of a process was given the processor."""
    found = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = (line.partition(":") for line in status.read_text().splitlines())
        found[status.parent.name] = [
            int(value) for key, _, value in lines if key.endswith("voluntary_ctxt_switches")
        ]
    return found


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.loop
def test_a_server_at_rest_does_not_wake(root, monkeypatch):
    """Not even to look whether it is still used, for what is active stays so until asked."""
    monkeypatch.setenv("THINPOOL_LINGER", "0.5")
    with Thinpool(root, timeout=20) as api:
        api.create_pool("p", size=256 * MIB, base_size=0, min_free=0.0)
        api.create("p/v", size=16 * MIB)
        api.snapshot_many("p/v", ["p/a", "p/b", "p/c"], activate=True)
        pids = (supervisor(root), api.status("p").server_pid)
    time.sleep(2.0)
    woken = []
    for _ in range(6):
        # What was begun comes to its end first, and others on the host may look at the mount; but
        # whatever wakes by a clock does so in each of these.
        before = [switches(pid) for pid in pids]
        time.sleep(4.0)
        after = [switches(pid) for pid in pids]
        woken.append([then != now for then, now in zip(before, after, strict=True)])
        if not any(woken[-1]):
            break
    assert not any(woken[-1]), woken
    with Thinpool(root, timeout=20) as api:
        assert api.status("p").server_pid == pids[1]
        api.remove(["p/a", "p/b", "p/c"], deactivate=True)
        wait_until(lambda: gone(pids[0]))  # used last now, and for its linger time
        api.remove_pool("p")


def test_worker_killed_under_raw_writes_loses_nothing(api, pool, rng):
    api.create("p/v", size=16 * MIB)
    model = bytearray(16 * MIB)
    killed = 0
    with api.open("p/v", writable=True) as handle:
        for turn in range(120):
            offset = rng.randrange(16 * MIB - 70_000)
            data = rng.randbytes(rng.randrange(1, 70_000))
            handle.write(offset, data)
            model[offset : offset + len(data)] = data
            if turn % 30 == 10:
                os.kill(api.status("p").server_pid, signal.SIGKILL)
                killed += 1
        assert handle.read(0, 16 * MIB) == model
    assert killed == 4
    assert api.check("p").clean
    with api.open("p/v") as handle:
        assert handle.read(0, 16 * MIB) == model


def test_worker_killed_between_requests_is_not_noticed(api, pool):
    for number in range(6):
        os.kill(api.status("p").server_pid, signal.SIGKILL)
        api.create(f"p/v{number}", size=MIB)
    assert {volume.name for volume in api.list("p")} == {f"v{number}" for number in range(6)}
    assert api.check("p").clean


def test_request_whose_worker_dies_half_way_is_done_once(api, pool, root, monkeypatch, tmp_path):
    for step in ("intent-written", "intent-flushed", "applied", "answered"):
        PoolClient(root, "p", timeout=20).stop_server()
        marker = tmp_path / step
        marker.touch()
        monkeypatch.setenv("THINPOOL_CRASH_AT", f"{step}:{marker}")
        assert api.create(f"p/{step}", size=MIB).name == step
        wait_until(lambda marker=marker: not marker.exists())  # it may be answered before
    monkeypatch.delenv("THINPOOL_CRASH_AT")
    assert [volume.id for volume in api.list("p")] == [0, 1, 2, 3]
    assert api.check("p").clean


def test_server_that_died_whole_is_started_again(api, pool, root):
    api.create("p/v", size=MIB)
    pid = supervisor(root)
    worker = api.status("p").server_pid
    os.kill(pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: gone(pid) and gone(worker))
    assert [volume.name for volume in api.list("p")] == ["v"]
    assert supervisor(root) != pid


@pytest.mark.fuse
@pytest.mark.loop
def test_what_was_activated_to_persist_comes_back_and_nothing_else(api, pool, root, require):
    """A server that dies whole takes its devices along, as a reboot does."""
    require("fuse", "loop")
    for name in ("always", "once", "formerly"):
        with api.open(str(api.create(f"p/{name}", size=MIB)), writable=True) as volume:
            volume.write(0, name.encode())
    api.activate("p/always", persist=True, mode=0o640)
    api.activate("p/once")
    api.activate("p/formerly", persist=True)
    api.deactivate("p/formerly")
    pid, worker = supervisor(root), api.status("p").server_pid
    os.kill(pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: gone(pid) and gone(worker))
    found = api.resume()
    assert not found.failures
    assert [each.volume.name for each in found.activations] == ["always"]
    device = Path(found.activations[0].device)
    assert device.stat().st_mode & 0o777 == 0o640
    assert device.read_bytes()[:6] == b"always"
    assert {v.name for v in api.list("p") if v.device} == {"always"}
    assert api.resume().activations[0].already_active
    api.deactivate("p/always")
    assert api.resume().activations == ()


def test_unused_server_ends_and_a_used_one_does_not(api, pool, root, monkeypatch):
    PoolClient(root, "p", timeout=20).stop_server()
    monkeypatch.setenv("THINPOOL_LINGER", "0.5")
    api.create("p/v", size=MIB)
    pid = supervisor(root)
    with api.open("p/v"):
        time.sleep(2)
        assert not gone(pid)
    wait_until(lambda: gone(pid))
    assert not (root / "pools" / "p" / "server.sock").exists()
    assert api.status("p").volumes == 1


def test_clients_that_come_while_a_server_ends_are_served(api, pool, root, monkeypatch):
    PoolClient(root, "p", timeout=20).stop_server()
    monkeypatch.setenv("THINPOOL_LINGER", "0.2")
    for number in range(8):
        api.create(f"p/v{number}", size=MIB)
        time.sleep(0.15 + 0.04 * number)
    assert len(api.list("p")) == 8


def test_second_opener_of_the_files_is_told_who_has_them(api, pool, root):
    status = api.status("p")
    other = Thinpool(root / "other", timeout=0.5)
    with pytest.raises(errors.BusyError) as caught:
        other.attach_pool("q", data=status.data.path, metadata=status.metadata.path)
    assert status.metadata.path in caught.value.message
    assert other.pools() == []
    assert api.status("p").mode == "rw"


def test_file_held_by_another_program_is_busy_after_the_timeout(api, pool, root):
    path = api.status("p").metadata.path
    PoolClient(root, "p", timeout=20).stop_server()
    with BlockDevice.open_file(path, exclusive=True):
        before = time.monotonic()
        with pytest.raises(errors.BusyError):
            Thinpool(root, timeout=1).status("p")
        assert time.monotonic() - before >= 1
    assert api.status("p").mode == "rw"


def test_client_killed_while_it_builds_leaves_nothing(api, pool, root):
    script = f"""
import time, sys
from thinpool.server.client import PoolClient
from thinpool.api.workbench import Workbench
from pathlib import Path
bench = Workbench(PoolClient(Path({str(root)!r}), "p", timeout=20))
volume = bench.create(size=1 << 20, kind="image")
handle = bench.raw(volume, writable=True)
handle.write(0, b"x" * 200000)
print("built", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "built\n"
    assert api.list("p") == []
    assert api.status("p").data.used > 0
    child.kill()
    child.wait()
    child.stdout.close()
    wait_until(lambda: api.status("p").data.used == 0, seconds=40)
    assert api.check("p").clean


def test_errors_cross_the_wire_with_their_types_and_attributes(api, pool):
    volume = api.create("p/v", size=MIB)
    with pytest.raises(errors.AlreadyExistsError) as caught:
        api.create("p/v", size=MIB)
    assert caught.value.existing["id"] == volume.id
    assert caught.value.existing["size"] == MIB
    with pytest.raises(errors.UsageError) as wrong:
        api.create("p/w", size=1000)
    assert wrong.value.what == "size"
    with pytest.raises(errors.NotFoundError):
        api.open("p/w")
    with api.open("p/v") as handle, pytest.raises(errors.UsageError):
        handle.read(MIB - 10, 20)


def test_pool_in_use_is_not_removed(api, pool):
    api.create("p/v", size=MIB)
    with api.open("p/v"):
        for operation in (api.remove_pool, api.detach_pool):
            with pytest.raises(errors.BusyError):
                operation("p")
        with pytest.raises(errors.BusyError):
            api.remove(["p/v"])
    assert api.status("p").volumes == 1


def test_two_raw_writers_exclude_each_other_and_readers_do_not(api, pool):
    api.create("p/v", size=MIB)
    with api.open("p/v", writable=True) as writer, api.open("p/v") as reader:
        with pytest.raises(errors.BusyError):
            api.open("p/v", writable=True)
        writer.write(5, b"seen")
        assert reader.read(5, 4) == b"seen"
    api.open("p/v", writable=True).close()


def test_other_languages_speak_plain_http(api, pool, root):
    body = json.dumps({"name": "v", "size": MIB}).encode()
    with connect(root / "pools" / "p", timeout=10) as sock:
        head = f"POST /v1/create HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        answer = b""
        while more := sock.recv(65536):
            answer += more
    head, _, text = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(text)["result"]["name"] == "v"


def test_nonsense_on_the_socket_hurts_nobody(api, pool, root, rng):
    for data in (b"", b"TP", b"TPRW" + bytes(12), b"TPRW" + b"\xff" * 40, rng.randbytes(400)):
        with connect(root / "pools" / "p", timeout=5) as sock:
            sock.sendall(data)
    worker = api.status("p").server_pid
    assert api.create("p/v", size=MIB).name == "v"
    assert api.status("p").server_pid == worker


def test_threads_share_one_api(api, pool):
    failures = []

    def work(number):
        try:
            for turn in range(5):
                api.create(f"p/t{number}-{turn}", size=MIB)
        except errors.ThinpoolError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    volumes = api.list("p")
    assert len(volumes) == 30
    assert len({volume.id for volume in volumes}) == 30
    assert api.check("p").clean
