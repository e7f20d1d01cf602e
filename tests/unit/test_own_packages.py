"""A process refuses to start with another distribution's package in the place of one of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdserve.own_packages import PACKAGES, find_foreign_package

ROOT = Path(__file__).parents[2]


def install(site: Path, package: str, distribution: str, version: str) -> None:
    """What pip leaves of a distribution with one package that says no more than that it is there."""
    folder = site / package
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it was imported')\n")
    info = site / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{package}/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


def run(*arguments: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_every_package_of_the_wheel_is_looked_at() -> None:
    folders = {file.parent.name for file in ROOT.glob("*/__init__.py")} | {"pd_kernels"}
    assert folders - {"pdserve", "tests", "benchmarks"} == set(PACKAGES)
    assert find_foreign_package() is None


@pytest.mark.parametrize("package", ["proxy", "pd_kernels"])
def test_a_package_that_comes_first_on_the_path_is_refused(package: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, package, "other.py", "2.4")
    done = run("-m", "pdserve", "--version", path=[site, ROOT, ROOT / "kernels"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"pdserve: the package {package} at {site / package} is of other.py 2.4, and hides that of pdserve at {ROOT}; "
        "install pdserve into an environment of its own\n"
    )


def test_a_package_whose_files_were_overwritten_is_refused(tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name in ("pdserve", *PACKAGES[:-1], "kernels/pd_kernels"):
        shutil.copytree(ROOT / name, site / Path(name).name, ignore=shutil.ignore_patterns("__pycache__"))
    assert run("-m", "pdserve", "--version", path=[site], cwd=tmp_path).returncode == 0
    install(site, "proxy", "proxy.py", "2.4.10")
    done = run("-m", "pdserve", "proxy", path=[site], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pdserve: the package proxy at {site / 'proxy'} is of proxy.py 2.4.10, ")
    assert len(done.stderr.splitlines()) == 1


def test_a_module_in_the_folder_where_it_is_started_is_refused(tmp_path: Path) -> None:
    (tmp_path / "proxy.py").touch()
    done = run("-m", "pdserve", "--version", path=[ROOT, ROOT / "kernels"], cwd=tmp_path)
    assert done.returncode == 2
    assert f"the package proxy at {tmp_path / 'proxy.py'} is of no installed distribution" in done.stderr


@pytest.mark.parametrize("module", ["pdserve.roles.main", "pdserve.roles.follower"])
def test_a_rank_of_an_engine_looks_before_it_imports_them(module: str, tmp_path: Path) -> None:
    install(tmp_path / "site", "kv_transfer", "other", "1")
    done = run("-m", module, path=[tmp_path / "site", ROOT, ROOT / "kernels"], cwd=tmp_path)
    assert done.returncode == 2
    assert "the package kv_transfer at" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_looking_takes_no_time() -> None:
    fastest_s = float("inf")
    for _ in range(20):
        started_s = time.process_time()
        find_foreign_package()
        fastest_s = min(fastest_s, time.process_time() - started_s)
    assert fastest_s < 0.005, "of this process's own time, whatever else the machine does"
