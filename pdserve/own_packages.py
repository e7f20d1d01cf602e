"""Whether the top-level packages that a process would import are pdserve's own.

The wheel installs seven of them, and some have names that others use, too: the distribution `proxy.py` also installs
`proxy`. Of two packages of one name Python imports the one that comes first on its path, and the distribution that is
installed last overwrites the other's files. The command and each rank of an engine look before they import any of them.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from pdserve.process import EXIT_CONFIG

PACKAGES = ("proxy", "cluster_manager", "context_worker", "generation_worker", "kv_transfer", "pd_kernels")

_MARK = b'\nDISTRIBUTION = "pdserve"\n'


def require_own_packages() -> None:
    """End the process with status 2 and one line on standard error if a package is another distribution's."""
    fault = find_foreign_package()
    if fault is not None:
        sys.stderr.write(f"pdserve: {fault}\n")
        sys.exit(EXIT_CONFIG)


def find_foreign_package() -> str | None:
    """What is wrong, in a line, if one of `PACKAGES` is not of the pdserve that runs; None if all are.

    Imports none of them. A package that is not there at all is not looked into: its import fails by itself.
    """
    home = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        file = Path(spec.origin).resolve()
        if file.parents[1] not in (home, home / "kernels") or _MARK not in file.read_bytes():
            whose = _owner(name, file) or "no installed distribution"
            place = file.parent if file.name == "__init__.py" else file
            return (
                f"the package {name} at {place} is of {whose}, and hides that of pdserve at {home}; "
                "install pdserve into an environment of its own"
            )
    return None


def _owner(name: str, file: Path) -> str | None:
    """The distribution, other than pdserve where there is one, that installed `file`."""
    owners = [
        f"{each.name} {each.version}"
        for each in distributions()
        for entry in each.files or ()
        if entry.parts[0] in (name, file.name) and Path(str(each.locate_file(entry))).resolve() == file
    ]
    return min(owners, key=lambda owner: owner.startswith("pdserve "), default=None)
