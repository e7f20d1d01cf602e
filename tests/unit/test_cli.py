"""The command line: where `-c` may stand, what is printed and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdserve.config import ClusterConfig
from pdserve.config.schema import all_keys
from pdserve.version import __version__

PDSERVE = [sys.executable, "-m", "pdserve"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PDSERVE, *arguments], capture_output=True, text=True, timeout=60, check=False, input=stdin)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"pdserve {__version__}\n")


def test_files_may_stand_before_and_after_the_command(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: a\nport: 1\n")
    second.write_text("model: b\n")
    assert yaml.safe_load(run("-c", str(first), "config").stdout)["port"] == 1
    assert yaml.safe_load(run("config", "-c", str(first)).stdout)["port"] == 1
    both = yaml.safe_load(run("-c", str(first), "config", "-c", str(second), "--port", "2").stdout)
    assert (both["model"], both["port"]) == ("b", 2)
    where = run("bench", "-c", "/nowhere.yaml", "kv", "--from", "context-0", "--to", "generation-0")
    assert (where.returncode, where.stderr) == (2, "pdserve: /nowhere.yaml: No such file or directory\n")


def test_standard_input_is_a_file() -> None:
    assert yaml.safe_load(run("config", "-c", "-", stdin="model: 007\n").stdout)["model"] == "007"


def test_three_mistakes_are_three_lines() -> None:
    done = run("config", "--model=m", "--backend=UCX", "--max_model_len", "5", "--prot=1")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("pdserve: ") and len(line) <= 210 for line in lines)
    assert any("max_model_len: unknown key; did you mean max_seq_len?" in line for line in lines)


@pytest.mark.parametrize("command", ["up", "config", "generation"])
def test_help_lists_every_key(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
    assert listed >= {f"--{'.'.join(key)}" for key in all_keys(ClusterConfig)}
    assert "--kv_cache_config.tokens_per_block int tokens of a block (default: 32)" in " ".join(done.stdout.split())


def test_help_of_a_command_without_keys_of_its_own_is_short() -> None:
    done = run("bench", "kv", "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) < 40
    assert "`pdserve config --help` lists them" in done.stdout


@pytest.mark.parametrize("arguments", ["config --model=m", "config --help", "--help", "--version"])
def test_a_reader_that_has_seen_enough_is_no_error(arguments: str) -> None:
    """The reader is gone before the first byte."""
    ours, theirs = os.pipe()
    os.close(ours)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    argv = [*PDSERVE, *arguments.split(), "--port=1", "--manager.port=1"]
    done = subprocess.run(argv, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False, env=environment)
    os.close(theirs)
    assert done.stderr == b""
    assert done.returncode == 141


def test_a_full_disk_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PDSERVE, "config", "--model=m"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_printed_configuration_can_be_read_by_others() -> None:
    done = run("config", "--model=m", "--disagg_cluster.cluster_uri=etcd://u:p@w/x@a:1")
    assert "p@w" not in json.dumps(yaml.safe_load(done.stdout))
