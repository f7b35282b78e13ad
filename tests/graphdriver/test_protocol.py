"""The calls as Docker makes them: layers made, mounted, counted, removed; restarts between them."""

from __future__ import annotations

import errno
import http.client
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.graphdriver.dockerd import root_tar
from tests.graphdriver.kit import Connection, RefusedError, eventually, tar_of

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.ext4]

MIB = 1 << 20


def refused(call, *arguments, **fields):
    """The text of an error that has to come."""
    with pytest.raises(RefusedError) as found:
        call(*arguments, **fields)
    return str(found.value)


# ---- discovery ----------------------------------------------------------------------------


def test_plugin_says_what_it_is(driver):
    assert driver.call("Plugin.Activate") == {"Implements": ["GraphDriver"]}
    assert driver.call("GraphDriver.Capabilities") == {"Capabilities": {}}


def test_init_takes_the_recorded_request_and_answers_nothing(driver):
    fields = {"Home": "/var/lib/docker/tp", "Opts": None, "UIDMaps": None, "GIDMaps": None}
    assert driver.call("GraphDriver.Init", **fields) == {}
    assert driver.call("GraphDriver.Init", **{**fields, "Opts": ["thinpool.basesize=1G"]}) == {}


def test_init_refuses_remapped_users(driver):
    maps = [{"container_id": 0, "host_id": 100000, "size": 65536}]
    assert "userns-remap" in refused(driver.call, "GraphDriver.Init", UIDMaps=maps)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("thinpool.basesize=512M", "less than the base's"),
        ("thinpool.basesize=x", "not a size"),
        ("thinpool.fs=xfs", "has ext4, not xfs"),
        ("dm.mkfsarg=-m0", "create-pool --mkfs-option"),
        ("dm.thinpooldev=/dev/mapper/x", "attach-pool"),
        ("dm.datadev=/dev/x", "create-pool --data"),
        ("dm.blocksize=128K", "create-pool --block-size"),
        ("dm.directlvm_device=/dev/x", "create-pool --data"),
        ("dm.blkdiscard=false", "always given back"),
        ("dm.use_deferred_removal=maybe", "true or false"),
        ("thinpool.mountopt=bind", "makes no sense"),
        ("thinpool.min_free_space=200%", "percent"),
        ("thinpool.nonsense=1", "no such option"),
        ("overlay2.size=1G", "no option of thinpool"),
        ("thinpool.fs", "=VALUE"),
    ],
)
def test_option_that_cannot_be_honoured_is_refused_with_what_does_it(driver, option, says):
    assert says in refused(driver.call, "GraphDriver.Init", Opts=[option])


def test_options_that_are_settings_are_set_and_others_kept(driver):
    given = [
        "thinpool.min_free_space=5%",
        "dm.thinp_autoextend_threshold=80",
        "dm.thinp_autoextend_percent=20",
        "dm.use_deferred_deletion=false",
        "dm.override_udev_sync_check=true",
        "dm.blkdiscard=true",
        "thinpool.fs=ext4",
        "thinpool.mountopt=noatime",
    ]
    driver.call("GraphDriver.Init", Opts=given)
    status = driver.api.status(driver.pool)
    assert (status.min_free, status.autoextend_threshold, status.autoextend_percent) == (5, 80, 20)
    driver.kill()
    driver.start()  # dockerd does not call Init again
    assert driver.status()["Deferred Deletion Enabled"] == "false"
    driver.create("optioned")
    where = driver.get("optioned")
    table = Path("/proc/self/mountinfo").read_text()
    line = next(each for each in table.splitlines() if f" {where} " in each)
    assert "noatime" in line.split()[5]
    assert not {"nodev", "nosuid"} & set(line.split()[5].split(","))
    driver.put("optioned")
    driver.remove("optioned")
    driver.call("GraphDriver.Init", Opts=None)


def test_status_has_the_facts_of_docker_info(driver):
    status = driver.status()
    assert status["Pool Name"] == "p"
    assert status["Pool Blocksize"] == "64 KiB"
    assert status["Base Device Size"] == "1 GiB"
    assert status["Backing Filesystem"] == "ext4"
    assert status["Data Space Total"] == "2 GiB"
    assert {
        "Data Space Used",
        "Data Space Available",
        "Metadata Space Used",
        "Metadata Space Total",
        "Metadata Space Available",
        "Thin Pool Minimum Free Space",
        "Deferred Removal Enabled",
        "Deferred Deletion Enabled",
        "Deferred Deleted Device Count",
    } <= status.keys()


def test_socket_and_folders_are_roots_alone(driver):
    assert driver.socket.stat().st_mode & 0o777 == 0o600
    assert driver.places.stat().st_mode & 0o777 == 0o700
    kept = driver.root / "pools" / "p" / "graphdriver-tp"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert (kept / "state.db").stat().st_mode & 0o777 == 0o600


def test_other_users_are_not_answered(driver):
    program = (
        "import socket, os, sys; s = socket.socket(socket.AF_UNIX);"
        "fd = os.open(sys.argv[1], os.O_PATH); os.setuid(65534);"
        "s.connect(f'/proc/self/fd/{fd}')"
    )
    done = subprocess.run(
        ["python3", "-c", program, str(driver.socket)], capture_output=True, text=True, check=False
    )
    assert "PermissionError" in done.stderr


# ---- making -------------------------------------------------------------------------------


def test_new_layer_without_parent_is_an_empty_directory(driver):
    driver.create("empty")
    where = driver.get("empty")
    assert list(where.iterdir()) == []
    assert where.stat().st_mode & 0o7777 == 0o755
    driver.put("empty")
    driver.remove("empty")


def test_create_again_is_fine_with_the_same_parent_only(driver):
    driver.create("one")
    driver.create("one")
    driver.create("two", "one")
    driver.create("two", "one")
    assert "exists already" in refused(driver.create, "two")
    assert "no layer missing" in refused(driver.create, "three", "missing")
    assert "own parent" in refused(driver.create, "three", "three")
    assert not driver.exists("three")
    driver.remove("two")
    driver.remove("one")


def test_layers_share_what_is_below_and_keep_their_own(driver):
    driver.layer("below", **{"etc": None, "etc/a": b"a", "etc/b": b"b"})
    driver.create("left", "below")
    driver.create("right", "below")
    left, right = driver.get("left"), driver.get("right")
    (left / "etc/a").write_text("changed")
    (right / "etc/b").unlink()
    assert (right / "etc/a").read_text() == "a"
    assert (left / "etc/b").read_text() == "b"
    below = driver.get("below")
    assert sorted(each.name for each in (below / "etc").iterdir()) == ["a", "b"]
    for layer in ("left", "right", "below"):
        driver.put(layer)
        driver.remove(layer)


def test_layer_on_one_that_is_mounted_and_written_to(driver):
    driver.create("live")
    where = driver.get("live")
    (where / "f").write_text("x" * 100_000)
    driver.create("child", "live")
    assert (driver.get("child") / "f").read_text() == "x" * 100_000
    for layer in ("child", "live"):
        driver.put(layer)
        driver.remove(layer)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_layers_run_and_read_as_fast_as_two(driver):
    """Docker's own store ends at 125, other clients do not."""
    driver.create("deep1")
    driver.apply("deep1", "", root_tar())
    driver.layer("deep2", "deep1", large=os.urandom(64 * MIB))
    for number in range(3, 201):
        driver.layer(f"deep{number}", f"deep{number - 1}", **{f"file{number}": b"%d" % number})
    where = driver.get("deep200")
    command = ["chroot", str(where), "sh", "-c", "cat /file3 /file100 /file200; cat /etc/passwd"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("3100200root:")
    driver.put("deep200")
    times = {"deep2": [], "deep200": []}
    for _ in range(4):
        for layer, seconds in times.items():
            seconds.append(read_time(driver, layer))
    print({layer: f"{min(seconds):.3f} s" for layer, seconds in times.items()})  # noqa: T201
    assert min(times["deep200"]) < 1.5 * min(times["deep2"])
    assert driver.changes("deep200", "deep199") == [("/file200", "A")]
    for number in range(200, 0, -1):
        driver.remove(f"deep{number}")
    assert driver.volumes() == {"base"}


def read_time(driver, layer):
    """How long it takes to read a large file of a layer that was just mounted."""
    with (driver.get(layer) / "large").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.monotonic()
        while file.read(MIB):
            pass
        seconds = time.monotonic() - begin
    driver.put(layer)
    return seconds


def test_what_is_no_layer_is_not_seen_and_not_touched(driver):
    driver.api.snapshot("p/base", "p/mine")
    for name in ("base", "mine"):
        assert not driver.exists(name)
        driver.remove(name)
        assert "no layer" in refused(driver.get, name)
        assert "no layer" in refused(driver.create, "child", name)
        assert "exists already" in refused(driver.create, name)
    assert driver.volumes() == {"base", "mine"}
    driver.api.remove(["p/mine"])


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../x", "a/b", "/etc", "-x", "a b", "a\nb", "a\0b", "é", "x" * 129, "٣"]
)
def test_what_cannot_be_an_id_is_refused(driver, name):
    for call in ("Create", "Get", "Put", "Remove", "Exists", "Changes", "DiffSize", "GetMetadata"):
        assert refused(driver.call, f"GraphDriver.{call}", ID=name)
    assert driver.volumes() == {"base"}


# ---- sizes --------------------------------------------------------------------------------


def fill(where, *, most):
    """Write until there is no space; how many bytes went in."""
    written = 0
    with (where / "fill").open("wb", buffering=0) as file:
        try:
            while written < most:
                written += file.write(bytes(MIB))
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
    return written


def test_smaller_size_is_enforced_also_against_root(driver):
    driver.layer("image", a=b"a" * 4096)
    driver.create("small-init", "image", "64M")
    driver.create("small", "small-init", "64M")
    where = driver.get("small")
    space = os.statvfs(where)
    assert space.f_bavail * space.f_frsize <= 64 * MIB
    assert 48 * MIB <= fill(where, most=200 * MIB) <= 64 * MIB
    (where / "fill").unlink()
    driver.put("small")
    driver.get("small")  # the limit is there again
    assert fill(where, most=200 * MIB) <= 64 * MIB
    driver.put("small")
    for layer in ("small", "small-init", "image"):
        driver.remove(layer)


def test_larger_size_gives_a_larger_filesystem(driver):
    driver.layer("image", a=b"a")
    driver.create("large", "image", "3gb")
    where = driver.get("large")
    space = os.statvfs(where)
    assert space.f_blocks * space.f_frsize > 2.8 * (1 << 30)
    assert (where / "a").read_bytes() == b"a"
    assert driver.call("GraphDriver.GetMetadata", ID="large")["Metadata"]["DeviceSize"] == str(
        3 << 30
    )
    driver.put("large")
    for layer in ("large", "image"):
        driver.remove(layer)


@pytest.mark.parametrize("size", ["1K", "x", "-1G", "999999P", ""])
def test_size_that_cannot_be_is_refused(driver, size):
    options = {"size": size}
    assert refused(driver.call, "GraphDriver.CreateReadWrite", ID="odd", StorageOpt=options)
    assert not driver.exists("odd")


def test_other_storage_option_is_refused(driver):
    options = {"colour": "red"}
    assert "only size" in refused(driver.call, "GraphDriver.Create", ID="odd", StorageOpt=options)


# ---- counting -----------------------------------------------------------------------------


def test_get_is_counted_and_a_put_too_many_is_harmless(driver):
    driver.create("counted")
    assert driver.get("counted") == driver.get("counted")
    driver.put("counted")
    assert driver.mounted() == {"counted"}
    driver.put("counted")
    assert driver.mounted() == set()
    driver.put("counted")
    driver.put("counted")
    driver.get("counted")
    assert driver.mounted() == {"counted"}
    driver.put("counted")
    assert driver.mounted() == set()
    driver.remove("counted")
    driver.put("counted")


def test_put_remove_and_exists_of_unknown_layers(driver):
    driver.put("nobody")
    driver.remove("nobody")
    assert not driver.exists("nobody")
    assert "no layer nobody" in refused(driver.get, "nobody")
    assert "no layer nobody" in refused(driver.diff, "nobody")
    assert "no layer nobody" in refused(driver.changes, "nobody", "")
    assert "no layer nobody" in refused(driver.size, "nobody", "")
    assert "no layer nobody" in refused(driver.apply, "nobody", "", tar_of({}))


def test_mounted_layer_is_removed(driver):
    driver.create("going")
    driver.get("going")
    driver.get("going")
    driver.remove("going")
    assert driver.mounted() == set()
    assert not driver.exists("going")


def test_layer_in_use_is_removed_when_it_is_not(driver):
    driver.create("held")
    where = driver.get("held")
    with (where / "f").open("wb"):
        driver.remove("held")
        assert not driver.exists("held")
        assert driver.mounted() == set()
        assert driver.status()["Deferred Deleted Device Count"] == "1"
        driver.create("held")  # the id is free again
        assert list(driver.get("held").iterdir()) == []
        driver.put("held")
        driver.remove("held")
        driver.kill()
        driver.start()  # what waits for removal is remembered
        assert driver.status()["Deferred Deleted Device Count"] == "1"
    eventually(lambda: driver.volumes() == {"base"})
    assert driver.status()["Deferred Deleted Device Count"] == "0"


def test_layer_in_use_is_busy_where_deferring_is_off(driver):
    off = ["dm.use_deferred_removal=false", "dm.use_deferred_deletion=false"]
    driver.call("GraphDriver.Init", Opts=off)
    driver.create("held")
    where = driver.get("held")
    with (where / "f").open("wb"):
        assert "in use" in refused(driver.remove, "held")
        assert driver.exists("held")
    driver.remove("held")
    driver.call("GraphDriver.Init", Opts=[])
    assert driver.volumes() == {"base"}


def test_put_of_a_layer_in_use_takes_its_device_down_later(driver):
    driver.create("held")
    where = driver.get("held")
    with (where / "f").open("wb") as file:
        driver.put("held")
        assert driver.mounted() == set()
        driver.get("held")  # the same filesystem again, not a second one
        file.write(b"late")
    assert (where / "f").read_bytes() == b"late"
    driver.put("held")
    eventually(lambda: driver.api.list("p")[-1].device is None)
    driver.remove("held")


# ---- namespaces ---------------------------------------------------------------------------


@pytest.mark.parametrize("volume", ["rslave", "rshared"])
def test_a_copy_of_the_hosts_mounts_does_not_hold_layers(driver, tmp_path, volume):
    """As runc does it: a slave copy of every mount, in which the host's root is bound again."""
    driver.create("bound")
    where = driver.get("bound")
    script = f"mount --rbind / {tmp_path} && mount --make-{volume} {tmp_path} && echo && exec cat"
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "slave", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"\n"
        before = Path(f"/proc/{process.pid}/mountinfo").read_text()
        assert f" {where} " in before
        driver.put("bound")
        assert str(where) not in Path(f"/proc/{process.pid}/mountinfo").read_text()
        assert driver.api.list("p")[-1].device is None
        process.stdin.close()
    driver.remove("bound")


# ---- restarts -----------------------------------------------------------------------------


def test_killed_and_started_again_it_carries_on(driver):
    driver.create("busy")
    where = driver.get("busy")
    driver.get("busy")
    with (where / "f").open("w") as file:
        file.write("before ")
        driver.kill()
        file.write("while it was away ")
        file.flush()
        driver.start()
        file.write("after")
    assert (where / "f").read_text() == "before while it was away after"
    assert driver.exists("busy")
    driver.put("busy")
    assert driver.mounted() == {"busy"}
    driver.put("busy")
    assert driver.mounted() == set()
    driver.remove("busy")


@pytest.mark.timeout(300)
def test_killed_at_any_moment_a_get_that_comes_again_counts_once(driver, rng):
    driver.create("again")
    body = json.dumps({"ID": "again"}).encode()
    # Whether an answer went out at the very moment of the kill nobody knows. Then the layer is held
    # too long: a Put after one that was answered may be taken for it, a Get that comes again not.
    doubtful = 0
    for call in ("Get", "Put") * 4:
        if call == "Put":
            driver.get("again")  # so that each round leaves one
        connection = Connection(driver.socket)
        connection.request("POST", f"/GraphDriver.{call}", body)
        time.sleep(rng.choice([0, 0.001, 0.003, 0.01, 0.03]))
        driver.kill()
        try:  # dockerd sends it again when no answer came, not otherwise
            answered = connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            answered = False
        connection.close()
        driver.start()
        doubtful += answered == (call == "Put")
        if not answered:
            driver.call(f"GraphDriver.{call}", ID="again")
        assert driver.mounted() == {"again"}
    puts = 0
    while driver.mounted():
        driver.put("again")
        puts += 1
        assert puts <= 4 + doubtful
    assert puts >= 4
    driver.remove("again")


def test_containers_of_a_dockerd_that_was_killed_are_held_once(driver):
    driver.create("restored")
    driver.get("restored")
    driver.get("restored")
    driver.call("GraphDriver.Init", Opts=[])  # dockerd is there again, with live-restore
    driver.get("restored")  # as it does at its start
    driver.put("restored")
    driver.call("GraphDriver.Cleanup")
    assert driver.mounted() == {"restored"}
    driver.put("restored")
    assert driver.mounted() == set()
    driver.get("restored")
    driver.call("GraphDriver.Init", Opts=[])
    driver.call("GraphDriver.Cleanup")  # nobody named it
    assert driver.mounted() == set()
    driver.remove("restored")


def test_stopped_in_order_it_leaves_what_is_mounted(driver):
    driver.create("kept")
    where = driver.get("kept")
    (where / "f").write_text("x")
    driver.stop()
    assert not driver.socket.exists()
    assert (where / "f").read_text() == "x"
    driver.start()
    driver.call("GraphDriver.Cleanup")  # somebody holds it: live-restore
    assert (where / "f").read_text() == "x"
    driver.put("kept")
    driver.remove("kept")


def test_second_process_for_one_driver_is_refused(driver):
    done = subprocess.run(
        [*driver.process.args, "--timeout", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 5
    assert driver.call("Plugin.Activate")


def test_nothing_is_left_at_the_end(driver):
    assert driver.mounted() == set()
    assert driver.volumes() == {"base"}
    assert "Traceback" not in driver.log.read_text()
    assert driver.api.check("p").clean
