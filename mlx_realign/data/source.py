# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: a JSONL file, a folder of splits, a hub dataset id, or a list of dicts. Read line by line."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .messages import RowError

SPLITS = {
    "train": ("train.jsonl",),
    "valid": ("valid.jsonl", "validation.jsonl", "val.jsonl", "dev.jsonl"),
    "test": ("test.jsonl",),
}
Rows = Sequence[dict[str, Any]]
LINE = 1 << 27  # bytes of the longest row that is read
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def resolve(data: str | Path | Rows, split: str = "train") -> Path | Rows:
    """The JSONL file of a split (a hub dataset is fetched first), or the list itself. UserError where there is none."""
    if not isinstance(data, str | Path):
        if not data:
            raise UserError("the list of rows is empty")
        return data
    path = _at_home(data)
    kind = _kind(path)
    if kind == stat.S_IFDIR:
        found = _in_folder(path, split)
        if found is None:
            there = ", ".join(_names(path)) or "nothing"
            raise UserError(f"{path}: no {' or '.join(SPLITS.get(split, (split,)))} in this folder (found: {there})")
        return found
    if kind:
        return path
    name = str(data)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and path.suffix not in (".jsonl", ".json"):
        from .hub import fetch

        return fetch(name, split)
    raise UserError(
        f"{path}: no such file or folder. Give a JSONL file, a folder with train.jsonl, or a hub dataset id"
    )


def has_split(data: str | Path | Rows, split: str) -> bool:
    """Whether a folder of splits has this one (a file or a list has only itself; a hub dataset is not asked)."""
    if not isinstance(data, str | Path):
        return False
    folder = _at_home(data)
    return _kind(folder) == stat.S_IFDIR and _in_folder(folder, split) is not None


def read(source: Path | Rows, digest: Any = None) -> Iterator[tuple[int, Any]]:
    """(line, row or RowError) one at a time; blank lines are skipped. Line numbers start at 1.

    digest: a hash that gets all bytes of the file, as `content_hash` does. UserError for what is no file of JSON lines.
    """
    if not isinstance(source, Path):
        yield from enumerate(source, 1)
        return
    try:
        with open(source, "rb") as file:
            for line, raw in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
                if digest is not None:
                    digest.update(raw)
                raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if line == 1 and raw.lstrip().startswith(b"["):
                    raise UserError(
                        f'{source}: this is a JSON array, not JSON lines. Convert it: python -c "import json,sys; '
                        f'[print(json.dumps(r)) for r in json.load(sys.stdin)]" < {source} > rows.jsonl'
                    )
                if len(raw) > LINE:
                    raise UserError(
                        f"{source} line {line}: longer than {LINE >> 20} MiB. This is no file of JSON lines, which has "
                        "one object on each line"
                    )
                if raw.strip():
                    yield line, _parse(raw.strip())
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror or error}") from error


def content_hash(source: Path | Rows) -> str:
    """Hash of all bytes of a file, or of the rows of a list."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, Path):
        try:
            with open(source, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{source}: cannot be read: {error.strerror or error}") from error
    else:
        for row in source:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def check_unchanged(source: Path | Rows, before: tuple[int, ...]) -> None:
    """UserError where a file that is read more than once is no longer what `stamp` saw."""
    if stamp(source) != before:
        raise changed(source)


def changed(source: Path | Rows) -> UserError:
    """That a file did not stay as it was while it was read."""
    return UserError(f"{source}: was changed while it was read. Start again once nothing writes to it")


def stamp(source: Path | Rows) -> tuple[int, ...]:
    """Which file it is, and when it was written last."""
    if not isinstance(source, Path):
        return ()
    try:
        found = os.stat(source)
    except OSError:
        return (-1,)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _in_folder(path: Path, split: str) -> Path | None:
    files = (path / name for name in SPLITS.get(split, (f"{split}.jsonl",)))
    return next((file for file in files if _kind(file) == stat.S_IFREG), None)


def _at_home(data: str | Path) -> Path:
    try:
        return Path(data).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(data)


def _kind(path: Path) -> int:
    """S_IFREG, S_IFDIR, or 0 where there is nothing. UserError for anything else: rows are read more than once."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0
    except OSError as error:  # a link to itself, a folder that may not be looked into
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if kind in _KINDS:
        raise UserError(
            f"{path}: is {_KINDS[kind]}, and rows are read more than once: write them into a file first "
            "(cat PIPE > rows.jsonl)"
        )
    return kind


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())[:10]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return RowError(f"invalid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return RowError("invalid JSON: nested too deeply")
    except ValueError:  # an integer of more digits than Python reads
        return RowError("invalid JSON: a number of thousands of digits")
