"""Fenced blocks of README.md, CONTRIBUTING.md and docs/, and commands of those that are shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_NOT_RUN = re.compile(r"<!-- not run by the tests: (.+) -->\n$")


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str
    language: str
    text: str
    not_run: str | None = None  # why, as the page says before it

    @property
    def page(self) -> str:
        """The page's path from the root."""
        return self.where.partition(":")[0]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page."""
    found, text = [], page.read_text()
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        before = text[: match.start()]
        where = f"{page.relative_to(ROOT)}:{before.count(chr(10)) + 1}"
        mark = _NOT_RUN.search(before)
        found.append(Block(where, match[1], match[2], mark and mark[1]))
    return found


def all_blocks(*languages: str) -> list[Block]:
    """All blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, without what is set for them and where their output goes."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;()"):
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


HEREDOC = re.compile(r"cat > (\S+) <<'(\w+)'\n((?:.*\n)*?)\2\n")


def without_files(text: str, folder: Path) -> str:
    """A shell block without the files that it writes, which are written into a folder."""

    def keep(match: re.Match[str]) -> str:
        (folder / match[1]).write_text(match[3])
        return ""

    return HEREDOC.sub(keep, text)
