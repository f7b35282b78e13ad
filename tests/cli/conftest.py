"""A command line whose API is a fake with the real one's signatures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from unittest.mock import create_autospec

import pytest

from thinpool import model
from thinpool.api import Thinpool
from thinpool.cli import app

CREATED = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


def a_volume(**changes: Any) -> model.Volume:
    values: dict[str, Any] = {
        "pool": "p",
        "name": "v",
        "id": model.VolumeId(17),
        "kind": "volume",
        "parent": None,
        "size": 10 << 30,
        "mapped": 65536,
        "exclusive": None,
        "read_only": False,
        "created": CREATED,
    }
    return model.Volume(**values | changes)


def a_status(**changes: Any) -> model.PoolStatus:
    values: dict[str, Any] = {
        "pool": "p",
        "uuid": "11111111-2222-3333-4444-555555555555",
        "engine": "user",
        "mode": "rw",
        "needs_check": False,
        "transaction_id": 9,
        "block_size": 65536,
        "data": model.DataSpace(
            path="/r/pools/p/data", used=1 << 30, total=100 << 30, low_water=10 << 30, host_free=5
        ),
        "metadata": model.MetadataSpace(path="/r/pools/p/metadata", used=1 << 20, total=1 << 30),
        "when_full": "queue",
        "volumes": 3,
        "active": 1,
    }
    return model.PoolStatus(**values | changes)


def a_report(*faults: model.Fault, **changes: Any) -> model.CheckReport:
    clean = not any(fault.severity in ("fatal", "leak") for fault in faults)
    values: dict[str, Any] = {"pool": "p", "clean": clean, "transaction_id": 9, "faults": faults}
    return model.CheckReport(**values | changes)


def a_fault(**changes: Any) -> model.Fault:
    values: dict[str, Any] = {
        "type": "checksum",
        "severity": "fatal",
        "structure": "mapping-tree",
        "block": 12,
        "device_id": 3,
        "message": "found 1, wanted 2",
    }
    return model.Fault(**values | changes)


def a_doctor_report(state: str = "ok") -> model.DoctorReport:
    return model.DoctorReport(
        host=(
            model.Finding(
                subject="dm", state="missing", message="no /dev/mapper/control", remedy="modprobe"
            ),
        ),
        pools={"p": (model.Finding(subject="p/v", state=state, message="id 17"),)},
    )


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it has to be."""
        assert self.stdout.endswith("\n")
        return json.loads(self.stdout)


class CommandLine:
    """Runs commands against a fake; ``api`` is an autospec of Thinpool, ``options`` what made it.

    An autospec refuses calls that the real signatures would refuse.
    """

    def __init__(self, capfd):
        self._capfd = capfd
        self.options: dict[str, Any] = {}
        self.connected = 0
        self.api = create_autospec(Thinpool, instance=True)
        api = self.api
        active = a_volume(device="/run/thinpool/dev/p/v")
        for name in ("create_pool", "attach_pool", "status", "set", "extend_pool"):
            getattr(api, name).return_value = a_status()
        api.pools.return_value = [a_status(), a_status(pool="q", mode="ro", needs_check=True)]
        for name in ("create", "deactivate", "umount", "rename", "resize"):
            getattr(api, name).return_value = a_volume()
        api.snapshot.return_value = a_volume(name="c", kind="container", parent="i")
        api.snapshot_many.return_value = [
            a_volume(name=name, kind="container", parent="i") for name in ("c", "d")
        ]
        for name in ("commit", "import_image"):
            getattr(api, name).return_value = a_volume(name="i", kind="image", read_only=True)
        api.activate.return_value = model.Activation(
            volume=active,
            device="/run/thinpool/dev/p/v",
            number="7:3",
            file=None,
            already_active=False,
        )
        api.resume.return_value = model.Resumed(
            activations=(api.activate.return_value,), failures=()
        )
        api.install_units.return_value = ["/u/thinpool-pools.service"]
        api.mount.return_value = model.Mounted(
            volume=active,
            device="/run/thinpool/dev/p/v",
            directory="/mnt",
            already_mounted=False,
        )
        api.list.return_value = [a_volume(), a_volume(name="c", id=18, parent="v")]
        api.remove.return_value = model.Removal(removed=(a_volume(),), freed=131072, dry_run=False)
        api.trim.return_value = model.Trim(volume=a_volume(), trimmed=65536)
        api.delta.return_value = model.Delta(
            left="p/a",
            right="p/b",
            block_size=65536,
            ranges=(model.DeltaRange(begin=0, length=131072, change="different"),),
        )
        api.diff.return_value = [model.FileChange(path="etc/hosts", change="modified")]
        api.export.return_value = model.Exported(volume=a_volume(), output="/f", written=10240)
        api.check.return_value = a_report()
        api.doctor.return_value = a_doctor_report()

    def connect(self, **options: Any) -> Thinpool:
        self.connected += 1
        self.options = options
        return self.api

    def __call__(self, *arguments: str) -> Result:
        code = app.main(arguments, connect=self.connect)
        out, err = self._capfd.readouterr()
        return Result(code=code, stdout=out, stderr=err)


@pytest.fixture(autouse=True)
def no_defaults(monkeypatch, tmp_path):
    """Keep the host's own defaults out."""
    monkeypatch.setenv("THINPOOL_CONFIG", str(tmp_path / "no-thinpool.toml"))
    monkeypatch.delenv("THINPOOL_ROOT", raising=False)
    monkeypatch.delenv("_THINPOOL_COMPLETE", raising=False)


@pytest.fixture
def thinpool(capfd):
    return CommandLine(capfd)
