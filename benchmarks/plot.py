"""Latency over throughput, from the JSON lines of `benchmarks.serve`: one curve for each file, one point for each load.

python -m benchmarks.plot --out comparison.png ours=ours.json theirs=theirs.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PANELS = (
    ("ttft_ms", "time to first token, ms"),
    ("tpot_ms", "time per output token, ms"),
    ("itl_ms", "inter-token latency, ms"),
)


def draw(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Write a figure with the median and the 99th percentile of each latency over output throughput.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("a plot needs matplotlib: pip install 'pdserve[bench]'") from None
    figure = Figure(figsize=(5 * len(PANELS), 4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, (name, rows) in enumerate(curves.items()):
            for percent, style in ((50, "o-"), (99, "o:")):
                points = sorted((row["output_tokens_per_s"], row[f"{key}_p{percent}"]) for row in rows)
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=f"{name}, p{percent}")
        axes.set(title=title, xlabel="output tokens/s", ylim=(0, None))
        axes.legend(fontsize="small")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("curves", nargs="+", metavar="NAME=FILE", help="a file that holds serve's output")
    arguments = parser.parse_args()
    files = dict(curve.split("=", 1) for curve in arguments.curves)
    draw(
        {name: json.loads(Path(file).read_text().splitlines()[-1])["rows"] for name, file in files.items()},
        arguments.out,
    )


if __name__ == "__main__":
    main()
