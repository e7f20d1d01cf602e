"""Folders for sockets go with their owners, killed ones too."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pdserve.private_folder import PREFIX, PrivateFolder

_OWNER = """
import time
from pdserve.private_folder import PrivateFolder
folder = PrivateFolder()
(folder.path / "socket").touch()
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_folder_is_private_and_goes_when_closed(temporary: Path) -> None:
    folder = PrivateFolder()
    assert folder.path.parent == temporary
    assert folder.path.name.startswith(PREFIX)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.close()
    folder.close()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_owner_leaves_is_removed_by_the_next_and_a_living_one_s_is_not(temporary: Path) -> None:
    owners = [subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    places = [Path((owner.stdout or sys.stdin).readline().strip()) for owner in owners]
    foreign = temporary / f"{PREFIX}of-something-else"
    foreign.mkdir()
    try:
        owners[0].send_signal(signal.SIGKILL)
        owners[0].wait(10)
        assert all(place.is_dir() for place in places), "a killed process cleans up nothing"
        folder = PrivateFolder()
        assert not places[0].exists()
        assert (places[1] / "socket").exists()
        assert foreign.exists()
        folder.close()
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
    PrivateFolder().close()
    assert list(temporary.iterdir()) == [foreign]


def test_its_path_has_room_for_a_socket_s_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = PrivateFolder()
    assert len(os.fsencode(folder.path / "from_engine")) <= 107
    folder.close()
    assert list(long.iterdir()) == []
