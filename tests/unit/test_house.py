"""The house's own rules that no linter knows: how long a file and a function may be, and that what is named exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("pdserve", "proxy", "cluster_manager", "context_worker", "generation_worker", "kv_transfer", "kernels")
PACKAGES = (*PARTS[:-1], "pd_kernels")
FOLDERS = (*PARTS, "tests", "benchmarks", "deploy", "docs", "schedule", "run", "layers", "models", "hosts", "parallel")
PROXY_KEYS = {f"proxy.{key}" for key in ("placement", "served_model_name", "tool_parser", "reasoning_parser")}
OTHERS = frozenset({*PROXY_KEYS, "proxy.py"})
"""Keys of the section `proxy`, and a distribution."""

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


def documents() -> Iterator[tuple[str, Path, str]]:
    """What speaks of the tree: name, the folder that its paths may start from, and text. Pages, then docstrings."""
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        if page.name != "log.md":  # tells of trees that were
            yield str(page.relative_to(ROOT)), ROOT, page.read_text()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", path.parent, text


def quoted(text: str) -> Iterator[str]:
    """The words, dotted names and paths that stand in backticks, none of them within a block of code."""
    for quote in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield from re.findall(r"[\w./*-]*\w[\w./*-]*", quote)


def exists(name: str, folder: Path) -> bool:
    """Whether a path is there, from the root, the engine's package or `folder`; NAME stands for what a reader adds."""
    named = name.replace("NAME.py", "").replace("NAME", "")
    return any((base / named).exists() for base in (ROOT, ROOT / "pdserve/engine", ROOT / "kernels", folder))


def resolves(name: str) -> bool:
    """Whether `a.b.C.d` begins with a module of ours and goes on with names that stand in it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath("kernels" if parts[0] == "pd_kernels" else "", *parts[:count])
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if module.is_file():
            words = set(re.findall(r"\w+", module.read_text()))
            return all(part in words for part in parts[count:])
    return False


def test_every_path_that_is_named_exists() -> None:
    wrong = [
        f"{where}: {name}"
        for where, folder, text in documents()
        for name in quoted(text)
        if re.fullmatch(r"[\w-]+(/[\w.-]+)*(/|/[\w-]+\.(py|md|yaml))", name)
        and name.split("/")[0] in FOLDERS
        and not exists(name, folder)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_that_is_named_exists() -> None:
    wrong = [
        f"{where}: {name}"
        for where, _, text in documents()
        for name in quoted(text)
        if re.fullmatch(r"[a-z_]\w*(\.\w+)+", name)
        and name.split(".")[0] in PACKAGES
        and not (name in OTHERS or resolves(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_class_that_is_named_exists() -> None:
    """In pages only: docstrings name classes of libraries, too."""
    known = set()
    for path in (*sources(), *(ROOT / "benchmarks").glob("*.py")):
        known.update(re.findall(r"\w+", path.read_text()))
    wrong = [
        f"{where}: {name}"
        for where, _, text in documents()
        for name in quoted(text)
        if where.endswith(".md") and re.fullmatch(r"[A-Z][a-z]\w*[A-Z]\w*", name) and name not in known
    ]
    assert not wrong, "\n".join(wrong)
