"""The house's own rules that no linter knows: how long a file and a function may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("pdserve", "proxy", "cluster_manager", "context_worker", "generation_worker", "kv_transfer", "kernels")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources() -> Iterator[Path]:
    for part in PARTS:
        yield from (ROOT / part).rglob("*.py")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_looked_at(part: str) -> None:
    assert any(path.is_relative_to(ROOT / part) for path in sources())


def test_files_and_functions_can_be_read_at_one_go() -> None:
    too_long = []
    for path in sources():
        text = path.read_text()
        name = path.relative_to(ROOT)
        if (num_lines := text.count("\n")) > MAX_FILE_LINES:
            too_long.append(f"{name}: {num_lines} lines, allowed: {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{name}: {node.name} has {num_lines} lines, allowed: {MAX_FUNCTION_LINES}")
    assert not too_long, "\n".join(too_long)
