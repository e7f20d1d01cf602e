"""The first release as its users have it: its wheel, built from its commit, and its own fakes to run it with."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

COMMIT = "f96ffcca1457b2f58366a9aa859ca302ff9c9c7a"

_REPOSITORY = Path(__file__).parents[2]


def first_release(folder: Path) -> list[Path]:
    """What to put on the path of Python to run the first release. Skips the test where git does not know it."""
    archive, source, installed = folder / "source.tar", folder / "source", folder / "installed"
    if _run("git", "cat-file", "-e", COMMIT, check=False).returncode:
        pytest.skip("the first release's commit is not in this clone")
    _run("git", "archive", COMMIT, "-o", str(archive))
    source.mkdir()
    _run("tar", "xf", str(archive), "-C", str(source))
    _run(
        sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)
    )
    [wheel] = folder.glob("pdserve-*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    (folder / "fakes").mkdir()
    (source / "tests").rename(folder / "fakes" / "tests")
    return [installed, folder / "fakes"]


def this_release() -> list[Path]:
    """The same for this tree."""
    return [_REPOSITORY, _REPOSITORY / "kernels"]


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, cwd=_REPOSITORY, check=check, capture_output=True, timeout=120)
