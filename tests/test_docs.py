"""README.md, CONTRIBUTING.md and docs/: links lead somewhere, code parses, commands, keys and files
that they name exist, the site builds without a warning.

What runs blocks to their end: test_newcomer.py, which names the others.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flash_sae_dist import TopKSAE
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.file import apply_override
from flash_sae_dist.launch.cli import BENCHES, _keys, build
from flash_sae_dist.launch.entry import words_of
from flash_sae_dist.training.job import Config, load_config, parse_config
from tests.pages import PAGES, ROOT, Block, all_blocks, commands, without_files

# Programs of which a block's commands are checked no further than bash does.
OTHERS = {".", "cat", "cd", "export", "git", "pre-commit", "tensorboard"}
# Names that stand for a reader's own file.
PLACEHOLDERS = {"CONFIG", "CONFIG.yaml"}
FOLDERS = "tests|docs|configs|launch|kernels|flash_sae_dist"
FILE = rf"(?:{FOLDERS})/[\w./-]+\.(?:py|sh|md|yaml|json|sbatch)"
# What follows the name of a section where no key is meant: files, and hookpoints of `model`.
NO_KEYS = {
    *("py", "md", "json", "jsonl", "yaml", "png", "html", "npy", "pt", "safetensors", "zarr"),
    "layers",
}


def blocks(*languages: str) -> list[Any]:
    """All blocks in these languages, as parameters of a test."""
    return [pytest.param(block, id=block.where) for block in all_blocks(*languages)]


def inline(page: Path) -> list[str]:
    """The code spans of a page, its blocks left out."""
    text = re.sub(r"^```.*\n(?:.*\n)*?```$", "", page.read_text(), flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def known_keys() -> set[str]:
    return {key.name for key in _keys(Config)}


@cache
def command_line() -> Any:
    return typer.main.get_command(build())


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command of `flash-sae WORDS` and what follows its name."""
    found, rest = command_line(), list(words)
    if words[0] == "bench":
        assert words[1] in BENCHES, f"there is no bench {words[1]!r}"
        module = importlib.import_module(f"flash_sae_dist.launch.{BENCHES[words[1]]}")
        found, rest = typer.main.get_command(module.app), rest[1:]
    while rest and rest[0] in getattr(found, "commands", ()):
        found, rest = found.commands[rest[0]], rest[1:]
    named = rest and not rest[0].startswith("-")
    assert not (hasattr(found, "commands") and named), f"flash-sae has no verb {rest[0]!r}"
    return found, rest


def check_options(command: Any, words: list[str]) -> None:
    """Every --option among words is one of the command's."""
    options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    wrong = {word for word in words if re.match(r"--\w", word)} - options
    assert not wrong, f"{command.name} has no {wrong}"


def check_config(config: str, overrides: list[str], folder: Path) -> None:
    """A config with its overrides is one that every key fits; of a placeholder the keys alone."""
    if config in PLACEHOLDERS:
        overrides = words_of(config, overrides)[1]
        assert {o.partition("=")[0] for o in overrides} <= known_keys()
        return
    file, overrides = words_of(config, overrides)
    if file is None:
        for override in overrides:
            apply_override({}, override)
        assert {o.partition("=")[0] for o in overrides} <= known_keys()
        return
    path = next((p for p in (folder / file, ROOT / file) if p.is_file()), None)
    assert path is not None, f"there is no {file}"
    load_config(path, overrides)


def check_verb(words: list[str], folder: Path) -> None:
    """`flash-sae WORDS` would begin its work."""
    command, rest = command_of(words)
    check_options(command, rest)
    if words[0] in ("bench", "store", "keys") or not rest or "--help" in rest:
        return
    params = command.make_context(command.name, list(rest)).params
    if "config" in params:
        check_config(params["config"], list(params["overrides"] or ()), folder)


def check_python(words: list[str], folder: Path) -> None:
    """`python WORDS`: a module or a file that is there, or code that compiles."""
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words[1]
        if words[1] == "flash_sae_dist":
            check_verb(words[2:], folder)
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def check_script(words: list[str], folder: Path) -> None:
    """`bash SCRIPT ...`"""
    assert (ROOT / words[0]).is_file(), words[0]
    if words[0] == "launch/quickstart.sh":
        check_config("configs/quickstart.yaml", words[1:], folder)
    elif words[0].startswith("launch/hosts/"):
        check_verb(words[1:], folder)


def check_launch(words: list[str], folder: Path) -> None:
    """`accelerate launch ... -m flash_sae_dist.launch.VERB ...`"""
    at = words.index("-m")
    module = words[at + 1]
    assert (ROOT / "launch" / f"{module.removeprefix('flash_sae_dist.launch.')}.py").is_file()
    if not module.rpartition(".")[2].startswith("bench"):
        check_verb([module.rpartition(".")[2], *words[at + 2 :]], folder)


def check_install(words: list[str], folder: Path) -> None:
    """`pip install ...`: its extras and files are there."""
    del folder
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if extras := re.search(r"\[(.*)\]", word):
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys(), word
        assert not word.endswith(".txt") or (ROOT / word).is_file(), word


def check_tests(words: list[str], folder: Path) -> None:
    """`pytest ...`: its files are there."""
    del folder
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists(), word


CHECKS = {
    "flash-sae": check_verb,
    "python": check_python,
    "bash": check_script,
    "accelerate": check_launch,
    "pip": check_install,
    "pytest": check_tests,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_are_told_what_they_are(page: Path) -> None:
    """Output has no language; a block in a language of which nothing is checked is a new one."""
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"bash", "python", "yaml", "text", "diff", ""}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_of_blocks_exist(block: Block, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)

    for program, *words in commands(without_files(block.text, tmp_path)):
        if program in OTHERS:
            continue
        if program == "mkdocs":
            assert (ROOT / "mkdocs.yml").is_file()
            continue
        assert program in CHECKS, f"{program}: give it a check, or name it in OTHERS"
        CHECKS[program](words, tmp_path)


def test_commands_are_taken_apart() -> None:
    text = "A=1 flash-sae keys k && bash x.sh \\\n  \"a=[1, 2]\" 'b c' > out  # said\n"
    assert commands(text) == [
        ["flash-sae", "keys", "k"],
        ["bash", "x.sh", "a=[1, 2]", "b c", ">", "out"],
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("flash-sae trian configs/quickstart.yaml", "no verb 'trian'"),
        ("flash-sae train configs/quickstart.yml", "there is no configs/quickstart.yml"),
        ("flash-sae plan configs/quickstart.yaml --gpus 3", "no {'--gpus'}"),
        ("flash-sae bench sted", "no bench 'sted'"),
        ("flash-sae train configs/quickstart.yaml sae.kk=3", "unknown key 'sae.kk'"),
        ("bash launch/quickstart.sh cache.stor=x", "unknown key 'cache.stor'"),
        ("pip install -e '.[object]'", "object"),
        ("pytest tests/test_no.py", "tests/test_no.py"),
    ],
)
def test_what_does_not_exist_is_found(line: str, told: str, tmp_path: Path) -> None:
    ((program, *words),) = commands(line)
    with pytest.raises((AssertionError, ConfigError), match=re.escape(told)):
        CHECKS[program](words, tmp_path)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles_and_imports_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            # Some are imported where they are asked for, as modules of their own are.
            lost = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            path = getattr(module, "__path__", None)
            if path is not None:
                lost = [n for n in lost if importlib.util.find_spec(f"{node.module}.{n}") is None]
            assert not lost, f"{node.module} has no {lost}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name) is not None, alias.name


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_is_of_known_sections(block: Block) -> None:
    data = yaml.safe_load(block.text)
    assert data.keys() <= Config.model_fields.keys()
    parse_config({"output": "runs/x", "train": {"num_tokens": 10}} | data)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_verbs_and_files_of_texts_exist(page: Path) -> None:
    sections = "|".join(key.name for key in _keys(Config) if key.section)
    text = page.read_text()
    for code in inline(page):
        for key, last in re.findall(rf"(?<![\w./<])((?:{sections})\.([a-z_0-9]+))\b", code):
            # `sae` is a module of Python's in some texts, too.
            is_attribute = key.startswith("sae.") and hasattr(TopKSAE, last)
            known = is_attribute or last in NO_KEYS or key in known_keys()
            assert known, f"{page.name}: `{code}`"
        if code.startswith("flash-sae "):
            words = re.sub(r"[\[\]]", " ", code).split()[1:]
            command, rest = command_of([w for w in words if w != "|"])
            check_options(command, rest)
    lost = [name for name in re.findall(rf"(?<![\w./]){FILE}", text) if not (ROOT / name).exists()]
    assert not lost, f"{page.name} names what is not there"


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*\n(?:.*\n)*?```$", "", page.read_text(), flags=re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"\w+://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in slugs(target), f"{page.name}: {link}"


def test_names_of_contributing_stand_in_the_files_that_it_names() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = {name for name in re.findall(FILE, text) if name.endswith(".py")}
    assert len(files) > 30
    known = set(re.findall(r"\w+", "".join((ROOT / name).read_text() for name in files)))
    codes = inline(ROOT / "CONTRIBUTING.md")
    names = {code for code in codes if re.fullmatch(r"\w*[A-Z_]\w*", code)}
    assert {"ARCHITECTURES", "KERNEL_FILES", "ExportFormat", "StoreFiles"} <= names
    assert names <= known


def test_the_changelog_is_by_release_and_the_newest_is_the_project_s() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(
        r"^## (\d+)\.(\d+)\.(\d+) \((?:unreleased|\d{4}-\d\d-\d\d)\)$", text, re.M
    )
    assert len(releases) == len(re.findall(r"^## ", text, re.M)) > 0
    numbers = [tuple(map(int, release)) for release in releases]
    assert numbers == sorted(set(numbers), reverse=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ".".join(releases[0])


def test_first_pages_stay_pages() -> None:
    """What a newcomer does not need in the first minutes stands in docs/, details in docs/notes."""
    for name, most in {"README.md": 160, "docs/performance.md": 150}.items():
        assert len((ROOT / name).read_text().splitlines()) <= most, f"{name}: move a part to docs/"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """A page outside the nav, a link without a target and an anchor without a heading are some."""
    for module in ("mkdocs", "material"):
        pytest.importorskip(module, reason="the site needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    pages = {p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")}
    made = {p.relative_to(tmp_path).with_suffix("") for p in tmp_path.rglob("*.html")}
    assert pages <= made
    assert "https://fonts." not in (tmp_path / "index.html").read_text()
