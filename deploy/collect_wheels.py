"""Collect the wheels of `airgapped.txt`, at the versions of `constraints.txt`, for another host's Python.

    python deploy/collect_wheels.py FOLDER [--python 3.12]

Carry FOLDER to the host and install it beside the host's own packages:

    pip install --no-index --no-deps --target SITE FOLDER/*.whl
    PYTHONPATH=SITE:.:kernels python -m pdserve up -c deploy/local.yaml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import install_step  # beside this program

_HERE = Path(__file__).parent
_GLIBC_MINORS = (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
_OLD_NAMES = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the other host's Python version")
    arguments = parser.parse_args()
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC_MINORS] + list(_OLD_NAMES)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", arguments.python, "--implementation", "cp", "-d", str(arguments.folder)]
    command += [part for platform in platforms for part in ("--platform", platform)]
    command += ["-r", str(_HERE / "airgapped.txt"), "-c", str(_HERE.parent / "constraints.txt")]
    status = install_step.main([f"wheels for Python {arguments.python}, about 150 MB", *command])
    if status == 0:
        wheels = sorted(arguments.folder.glob("*.whl"))
        size_mib = sum(wheel.stat().st_size for wheel in wheels) / (1 << 20)
        sys.stdout.write(f"{len(wheels)} wheels, {size_mib:.0f} MiB, in {arguments.folder}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
