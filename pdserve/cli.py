"""The `pdserve` command: starts the parts, shows and measures the cluster, prints the effective configuration."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pdserve.config import ClusterConfig, load, mask_text, masked
from pdserve.errors import ConfigError, ListenError, PdserveError
from pdserve.log_output import escaped, standard_error
from pdserve.own_packages import require_own_packages
from pdserve.process import (
    EXIT_ADDRESS,
    EXIT_CONFIG,
    EXIT_FAILED,
    configure_logging,
    die_with_parent,
    open_standard_descriptors,
    run_loop,
)
from pdserve.version import __version__

_EXIT_INTERRUPTED, _EXIT_PIPE = 128 + 2, 128 + 13  # as of a process that the signal ended

_EPILOG = """\
Any key of the configuration may be given as a flag and beats the files: --context_servers.num_instances=2
`pdserve config --help` lists them.
Environment variables beat the files too: PDSERVE_CONTEXT_SERVERS__NUM_INSTANCES=2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2 for a bad configuration)."""
    open_standard_descriptors()
    require_own_packages()
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`). What is left of it must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_PIPE
    except OSError as error:
        return _end(f"standard output: {error.strerror or error}", EXIT_FAILED)


def _run(argv: Sequence[str] | None) -> int:
    arguments, rest = _parser().parse_known_args(argv)
    serves = arguments.run in _SERVERS
    configure_logging("info" if serves else "warning")
    try:
        files = [Path(file) for level in (0, 1, 2) for file in getattr(arguments, f"config_{level}", [])]
        # Who manages a cluster, or asks a running one, has nothing to do with its model.
        beneath = {"model": "any"} if arguments.run in (_manager, _ps, _bench_kv) else {}
        config = load(files, rest, dict(os.environ), beneath)
        configure_logging(config.log_level)
        return int(arguments.run(config, arguments))
    except ConfigError as error:
        return _end(error, EXIT_CONFIG)
    except ListenError as error:
        return _end(error, EXIT_ADDRESS)
    except PdserveError as error:
        return _end(error, EXIT_FAILED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not serves:
            raise
        return _end(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def _end(error: Exception | str, status: int) -> int:
    """Say why the command ends, a line for each fault."""
    for line in mask_text(str(error)).splitlines():
        standard_error().write(f"pdserve: {escaped(line)}")
    standard_error().flush()
    return status


class _Parser(argparse.ArgumentParser):
    """A command's; of one that starts something or prints the configuration, --help lists every key."""

    lists_keys = False

    def format_help(self) -> str:
        from pdserve.config.sources import help_of_keys

        return super().format_help() + (f"\n{help_of_keys()}" if self.lists_keys else "")

    def print_help(self, file: Any = None) -> None:
        """Unlike argparse's, fails if it can't be written."""
        (file or sys.stdout).write(self.format_help())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pdserve",
        description="Serve large language models with prefill and decode on separate workers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[_files(0)],
    )
    parser.add_argument("--version", action="version", version=f"pdserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, among: Any = commands, level: int = 1) -> argparse.ArgumentParser:
        sub: _Parser = among.add_parser(
            name,
            parents=[_files(level)],
            help=text,
            description=text,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        sub.lists_keys = run in (*_SERVERS, _config)
        return sub

    command("up", _up, "start manager, proxy and all workers on this host, and keep them running")
    command("manager", _manager, "run the cluster manager")
    command("proxy", _proxy, "run the OpenAI proxy")
    for role in ("context", "generation"):
        worker = command(role, _worker, f"run one {role} worker")
        worker.set_defaults(role=role)
        worker.add_argument("--index", type=int, default=0, help="its number within the pool, from 0")
    ps = command("ps", _ps, "list the processes of a running cluster")
    ps.add_argument("--json", action="store_true", help="print JSON")
    command("config", _config, "print the effective configuration, secrets masked")
    bench = commands.add_parser("bench", help="measure a running cluster", parents=[_files(1)], allow_abbrev=False)
    benches = bench.add_subparsers(required=True, metavar="BENCHMARK")
    kv = command("kv", _bench_kv, "measure KV transfers between two running workers, which go on serving", benches, 2)
    kv.add_argument("--from", dest="source", required=True, metavar="WORKER", help="a context worker, as ps lists it")
    kv.add_argument("--to", dest="target", required=True, metavar="WORKER", help="a generation worker")
    sizes = kv.add_mutually_exclusive_group()
    sizes.add_argument("--mb", type=_positive, nargs="+", help="sizes; powers of 4 from 1 to 4096 if not given")
    sizes.add_argument("--mib", type=_positive, nargs="+", help="the same in units of 2^20 bytes")
    kv.add_argument("--json", action="store_true", help="print JSON, and the table on standard error")
    kv.add_argument("--repeats", type=_positive, default=5, help="handoffs a size")
    kv.add_argument("--evict", action="store_true", help="let cached prefixes go where no blocks are free")
    return parser


def _files(level: int) -> _Parser:
    """`-c`, which may stand before and after a subcommand: each place has a list of its own, for argparse would have
    the later place's replace the earlier's."""
    shared = _Parser(add_help=False)
    shared.add_argument(
        *("-c", "--config"),
        action="append",
        default=[],
        metavar="FILE",
        dest=f"config_{level}",
        help="YAML; merged in order; - is standard input",
    )
    return shared


def _positive(text: str) -> int:
    """For argparse."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def _up(config: ClusterConfig, _: argparse.Namespace) -> int:
    from pdserve.supervisor import Supervisor

    return asyncio.run(Supervisor(config).run())


def _manager(config: ClusterConfig, _: argparse.Namespace) -> int:
    from cluster_manager.server import run

    die_with_parent()
    run_loop(lambda: run(config))
    return 0


def _proxy(config: ClusterConfig, _: argparse.Namespace) -> int:
    from proxy.server import run

    die_with_parent()
    run_loop(lambda: run(config))
    return 0


def _worker(config: ClusterConfig, arguments: argparse.Namespace) -> int:
    from pdserve.worker.launch import run_worker

    die_with_parent()
    return run_worker(config, arguments.role, arguments.index)


def _ps(config: ClusterConfig, arguments: argparse.Namespace) -> int:
    from pdserve.process_list import as_table, collect

    found = asyncio.run(collect(config))
    if arguments.json:
        print(json.dumps([row._asdict() for row in found.rows], indent=2))
    elif found.is_anything_up:
        print(as_table(found.rows))
    if found.problem is None:
        return 0
    print(f"pdserve: {found.problem}", file=sys.stderr)
    return 1


def _bench_kv(config: ClusterConfig, arguments: argparse.Namespace) -> int:
    from pdserve.bench_kv import MB, SIZES_MB, measure
    from pdserve.machine_load import busy_warning

    # Standard output is for one of the two.
    out = sys.stderr if arguments.json else sys.stdout
    if (warning := busy_warning()) is not None:
        print(f"pdserve: {warning}", file=sys.stderr)
    sizes = [mib << 20 for mib in arguments.mib or ()] or [mb * MB for mb in arguments.mb or SIZES_MB]
    say = partial(print, file=out, flush=True)
    report = asyncio.run(
        measure(config, arguments.source, arguments.target, sizes, arguments.repeats, arguments.evict, say)
    )
    if arguments.json:
        print(json.dumps(report.as_dict()))
    return 1 if all(row.skipped for row in report.rows) else 0


def _config(config: ClusterConfig, _: argparse.Namespace) -> int:
    yaml.safe_dump(masked(config), sys.stdout, sort_keys=False)
    return 0


_SERVERS = (_up, _manager, _proxy, _worker)

if __name__ == "__main__":
    sys.exit(main())
