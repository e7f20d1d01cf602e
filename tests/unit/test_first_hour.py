"""What a new user meets: the README's commands, `make`, the steps of an installation, the package's metadata."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import PathDistribution
from pathlib import Path
from types import ModuleType

import pytest

from pdserve import conversion_cache

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))


def commands() -> list[list[str]]:
    """The words of each command that the README shows, without its comment."""
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:].partition("  #")[0].split() for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_runs_as_it_is_written(words: list[str]) -> None:
    """In a new shell, where no environment is active: by the path of its program, or one that every host has."""
    program = next(word for word in words if "=" not in word)
    if program == "make":
        assert words[1] in TARGETS
    elif "PYTHONPATH" not in words[0]:
        venv = {f".venv/bin/{path.name}" for path in Path(sys.executable).parent.iterdir()}
        assert program in venv | {"curl", "pip"}
    for flag, file in itertools.pairwise(words):
        if flag == "-c":
            assert (ROOT / file).is_file()
        if flag == "-m":
            assert file == "pdserve" or (ROOT / f"{file.replace('.', '/')}.py").is_file()
    if program.endswith("/etcd"):
        folder = words[words.index("--data-dir") + 1]
        assert f"{folder}/" in (ROOT / ".gitignore").read_text().splitlines()
        assert f" {folder} " in MAKEFILE[MAKEFILE.index("\nclean:") :]


@pytest.mark.parametrize("variable", ["PDSERVE_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_make_clean_removes_the_converted_models_and_nothing_beside_them(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PDSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, str(tmp_path / "with a blank"))
    cache = conversion_cache.cache_folder()
    kept = [tmp_path / "with a blank" / "kept", tmp_path / "repository" / "kept"]
    for folder in (cache / "model-1", *kept):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path / "repository")
    subprocess.run(["make", "clean"], cwd=tmp_path / "repository", check=True, capture_output=True, timeout=60)
    assert not cache.exists()
    assert all(folder.is_dir() for folder in kept)


STEP = [sys.executable, str(ROOT / "deploy" / "install_step.py")]


@pytest.fixture
def install_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    import install_step

    return install_step


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("Collecting torch==2.11.0", "looking up torch==2.11.0"),
        ("  Downloading torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl (530.6 MB)", None),
        ("  Downloading https://index.example/a/b/x-1-py3-none-any.whl.metadata (5.1 kB)", None),
        ("Installing collected packages: mpmath, triton, torch", "unpacking 3 packages"),
        ("Requirement already satisfied: numpy in ./.venv", ""),
    ],
)
def test_what_pip_does_is_said_in_short(line: str, phase: str | None, install_step: ModuleType) -> None:
    told = install_step.phase_of(line)
    if phase is None:
        assert re.fullmatch(r"downloading (torch-2|x-1)\S+\.whl \(\S+ [Mk]B\)", told)
    else:
        assert (told or "") == phase


def test_a_step_of_an_installation_says_what_it_is_at(
    install_step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_step, "EVERY_S", 0.2)
    program = "import time; print('Collecting torch', flush=True); time.sleep(1.5); print('Successfully installed')"
    assert install_step.main(["2 of 4: torch, a minute", sys.executable, "-c", program]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 of 4: torch, a minute ...\n")
    assert re.search(r"^ +\d s  looking up torch$", out, re.M)
    assert re.search(r"^ +\d s  done$", out, re.M)


def test_a_step_that_fails_shows_all_and_ends_the_installation() -> None:
    program = "import sys; print('no matching distribution'); sys.exit(3)"
    done = subprocess.run(
        [*STEP, "a step", sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert "no matching distribution" in done.stdout
    assert "failed: " in done.stdout


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Of the wheel, as the build backend makes it from `pyproject.toml`."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "pdserve/version.py"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in ("pdserve", "kernels/pd_kernels"):
        (source / name).mkdir(parents=True, exist_ok=True)
        (source / name / "__init__.py").touch()
    code = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return PathDistribution(source / done.stdout.splitlines()[-1]).metadata  # type: ignore[return-value]


def test_the_wheel_says_what_it_is(metadata: Mapping[str, str]) -> None:
    assert metadata["Summary"] == "Serves large language models with prefill and decode on separate workers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "inference" in metadata["Keywords"]
    classifiers = set(metadata.get_all("Classifier"))  # type: ignore[attr-defined]
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= classifiers
    lowest, highest = re.findall(
        r"3\.(\d+)", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    )
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in range(int(lowest), int(highest))}
    assert {name for name in classifiers if re.search(r"3\.\d+$", name)} == versions


def test_every_benchmark_says_that_a_host_is_busy() -> None:
    for file in (ROOT / "benchmarks").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        # Neither measures by itself: one draws, the other is a part of a benchmark.
        if "def main(" in text and file.stem not in ("plot", "paced_engine"):
            assert "    warn_if_busy()" in text, file
