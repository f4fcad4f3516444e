"""The layout's own rules: links, floors, no package that hides another's, no files that grow
without end.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"kernels"},
    {"config", "files", "parallel", "progress"},
    {"activations", "models"},
    {"training"},
    {"grid", "evaluation", "interop", "planner"},
    {"launch"},
]


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


def imported_parts(file: Path) -> set[str]:
    """Top-level parts of flash_sae_dist that a file imports, absolutely or relatively."""
    relative = file.relative_to(ROOT)
    inside = relative.parts if relative.parts[0] != "flash_sae_dist" else relative.parts[1:]
    package = ["flash_sae_dist", *inside[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "flash_sae_dist" and len(parts) > 1:
                found.add(parts[1])
    return found


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


def test_kernels_import_nothing_of_the_framework() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        assert imported_parts(file) <= {"kernels"}, file


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
    }


def test_files_stay_small() -> None:
    long = {
        f.relative_to(ROOT).as_posix(): n
        for f in sources()
        if (n := len(f.read_text().splitlines())) > 450
    }
    assert not long


def test_no_pickles_and_no_unsafe_yaml() -> None:
    for file in sources():
        text = file.read_text()
        assert "torch.load(" not in text, file
        assert "import pickle" not in text, file
        assert "yaml.load(" not in text, file
