"""The layout's own rules: links, floors, no package that hides another's, no files that grow
without end.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"kernels"},
    {
        "config",
        "ending",
        "files",
        "identity",
        "parallel",
        "page_lock",
        "progress",
        "sums",
        "tensor_files",
    },
    {"activations", "models", "interop"},
    {"training"},
    {"grid", "evaluation", "planner", "features", "compat", "api", "exporting", "hub", "verify"},
    {"launch", "__main__"},
]
MAX_FILE_LINES = 500
# Without docstrings.
MAX_FUNCTION_LINES = {"kernels": 80, "framework": 40}
# Longer ones of before the rule. The list may only shrink: a line that is no longer needed fails.
LONG_FUNCTIONS = {
    "launch/bench.py encode": 55,
}


def sources() -> list[Path]:
    """Every Python file of the package, the linked folders once."""
    files = [*ROOT.glob("kernels/*.py"), *ROOT.glob("launch/*.py")]
    files += [
        p for p in ROOT.glob("flash_sae_dist/**/*.py") if not p.is_relative_to(ROOT / "launch")
    ]
    linked = (ROOT / "flash_sae_dist/kernels", ROOT / "flash_sae_dist/launch")
    return [p for p in files if not any(p.is_relative_to(folder) for folder in linked)]


def floor_of(part: str) -> int | None:
    """The floor of a top-level part of the package."""
    return next((n for n, parts in enumerate(FLOORS) if part in parts), None)


def module_of(file: Path) -> str:
    """A file's module below flash_sae_dist, such as `training.step`; a package is its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "flash_sae_dist" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(file: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names below flash_sae_dist that import statements of a file mean: each is a module, or
    a name in one.
    """
    relative = file.relative_to(ROOT)
    inside = relative.parts if relative.parts[0] != "flash_sae_dist" else relative.parts[1:]
    package = ["flash_sae_dist", *inside[:-1]]
    found: set[str] = set()
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        prefix = "flash_sae_dist."
        found |= {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return found


def imported_parts(file: Path) -> set[str]:
    """Top-level parts of flash_sae_dist that a file imports, anywhere in it."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {name.partition(".")[0] for name in imported_names(file, nodes)}


def on_import(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those of functions, nor those for
    type checkers alone.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from on_import(node.orelse)
            continue
        yield node
        for block in ("body", "orelse", "finalbody"):
            yield from on_import(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from on_import(handler.body)


def import_graph() -> dict[str, set[str]]:
    """The modules that each module imports when it is imported itself."""
    files = {module_of(file): file for file in sources()}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        names = imported_names(file, on_import(ast.parse(file.read_text()).body))
        # `from ..models import topk` is a module, `from ..models import ARCHITECTURES` the package.
        graph[module] = {n if n in files else n.rpartition(".")[0] for n in names}
        assert graph[module] <= files.keys(), module
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import one another in a circle; None where there are none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(graph[module]):
            if circle := walk(other, [*path, module]):
                return circle
        done.add(module)
        return None

    return next((circle for module in sorted(graph) if (circle := walk(module, []))), None)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    text = ast.get_docstring(function, clean=False)
    told = 0 if text is None else (first.end_lineno or 0) - first.lineno + 1
    return (function.end_lineno or 0) - function.lineno + 1 - told


def test_kernels_and_launch_are_links_without_init() -> None:
    for name in ("kernels", "launch"):
        link = ROOT / "flash_sae_dist" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert not (ROOT / name / "__init__.py").exists(), "it would hide Hugging Face's package"


def test_imports_point_down() -> None:
    wrong = []
    for file in sources():
        relative = file.relative_to(ROOT)
        part = relative.parts[0] if relative.parts[0] != "flash_sae_dist" else relative.parts[1]
        here = floor_of(part.removesuffix(".py"))
        for other in imported_parts(file):
            there = floor_of(other)
            if here is not None and there is not None and there > here:
                wrong.append(f"{relative} imports {other}")
    assert not wrong


def test_every_part_has_a_floor() -> None:
    parts = {module_of(file).partition(".")[0] for file in sources()} - {""}
    assert {part for part in parts if floor_of(part) is None} == set()


def test_there_is_no_import_circle() -> None:
    assert circle_in(import_graph()) is None


def test_the_search_finds_circles() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_kernels_import_nothing_of_the_framework() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert imported_parts(file) <= {"kernels"}, file


def test_deepspeed_is_imported_where_it_is_asked_for_alone() -> None:
    """Most have not installed it; tests/dist/test_deepspeed.py looks at what other libraries do."""
    engine = "training.engines.deepspeed"
    assert not [module for module, names in import_graph().items() if engine in names]
    texts = {module_of(file): file.read_text() for file in sources()}
    assert {module for module, text in texts.items() if "import deepspeed\n" in text} == {engine}
    assert not [module for module, text in texts.items() if "from deepspeed" in text]
    assert "\nimport deepspeed" not in texts[engine], "it stands in a function"


def test_only_one_file_imports_transformers() -> None:
    users = {
        file.relative_to(ROOT).as_posix()
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text()))
        if (
            isinstance(node, ast.Import)
            and any(a.name.startswith("transformers") for a in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"))
    }
    assert users <= {
        "flash_sae_dist/activations/harvest.py",
        "flash_sae_dist/activations/language_model.py",
        "launch/bench_cache.py",
    }


def test_files_stay_small() -> None:
    long = {
        f.relative_to(ROOT).as_posix(): n
        for f in sources()
        if (n := len(f.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_functions_stay_small() -> None:
    long: dict[str, int] = {}
    for file in sources():
        relative = file.relative_to(ROOT)
        limit = MAX_FUNCTION_LINES["kernels" if relative.parts[0] == "kernels" else "framework"]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, lines = f"{relative.as_posix()} {node.name}", lines_of(node)
                if lines > limit:
                    long[name] = max(lines, long.get(name, 0))
    grown = {name: n for name, n in long.items() if n > LONG_FUNCTIONS.get(name, 0)}
    assert not grown, "shorten them"
    assert LONG_FUNCTIONS.keys() <= long.keys(), "take what is short by now off LONG_FUNCTIONS"


def test_no_pickles_and_no_unsafe_yaml() -> None:
    for file in sources():
        text = file.read_text()
        assert "import pickle" not in text, file
        assert "yaml.load(" not in text, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [ast.unparse(k.value) for k in node.keywords if k.arg == "weights_only"]
                assert safe == ["True"], f"{file}: {ast.unparse(node)}"


def test_every_open_of_a_store_is_of_zarr_v3() -> None:
    """Metadata of Zarr v2 may ask for a codec that unpickles."""
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("zarr.open"):
                formats = [ast.unparse(k.value) for k in node.keywords if k.arg == "zarr_format"]
                assert formats == ["3"], f"{file}: {ast.unparse(node)}"
