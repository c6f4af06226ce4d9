# SPDX-License-Identifier: Apache-2.0
"""Reads the fenced blocks of the project's pages: commands, example rows, Python, output.

A block of rows says its file and method behind the language: ```jsonl file=pairs.jsonl method=dpo. A command that is
meant to fail ends in `# exit code 2`. A ```text output block holds what the command above it prints.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / ".claude/skills/training-methods.md", *(ROOT / "docs").glob("*.md")])


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int  # of its first line of text, from 1
    language: str
    tags: dict[str, str]
    text: str


class Command(NamedTuple):
    """One command line of a page."""

    page: str
    line: int
    words: list[str]
    code: int  # the exit code it is meant to have
    output: str | None  # what it must print, where the page shows that


def name(page: Path) -> str:
    """`docs/data.md`."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found, start, head = [], 0, None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if head is None:
            head, start = line[3:].split(), number
            continue
        tags = {key: value for key, _, value in (word.partition("=") for word in head[1:])}
        text = "".join(f"{one}\n" for one in lines[start : number - 1])
        found.append(Block(name(page), start + 1, head[0] if head else "", tags, text))
        head = None
    assert head is None, f"{name(page)}: the block of line {start} does not end"
    return found


def every(language: str) -> list[Block]:
    """The blocks of a language, of all pages."""
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def commands(page: Path) -> list[Command]:
    """Every command of a page's sh blocks; a line that ends in a backslash goes on in the next."""
    found = []
    listed = blocks(page)
    for block, after in zip(listed, [*listed, None][1:], strict=True):
        if block.language != "sh":
            continue
        lines = re.sub(r"\\\n", " ", block.text).splitlines()
        shown = after.text if after and after.language == "text" and "output" in after.tags else None
        for offset, line in enumerate(lines):
            if words := shlex.split(line, comments=True):
                code = re.search(r"# exit code (\d+)", line)
                output = shown if offset == len(lines) - 1 else None
                found.append(Command(block.page, block.line + offset, words, int(code[1]) if code else 0, output))
    return found


def sections(page: Path) -> dict[str, str]:
    """Title of each second-level heading -> its text."""
    parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every table of a text: its rows, each a cell by the head of its column."""
    found, head = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = cells
            found.append([])
        elif set("".join(cells)) != {"-"}:  # the line below the head
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found
