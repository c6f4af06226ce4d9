# SPDX-License-Identifier: Apache-2.0
"""Tokenised rows on disk: flat columns, written in one pass, read through memory maps.

A dataset is a folder of raw little-endian arrays plus meta.json (sizes and checksums). It is written under another
name and renamed when complete, so a folder that exists is whole; one whose bytes no longer match is built anew.
"""

import errno
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from ..batch import Completion, Example
from ..cache import cache_dir
from ..errors import UserError

COLUMNS = {
    "tokens": np.int32,  # prompt, then each completion, of every row
    "mask": np.bool_,  # as tokens
    "row_start": np.int64,  # [n + 1] into tokens
    "prompt_length": np.int32,  # [n]
    "completion_start": np.int64,  # [n + 1] into completion_length
    "completion_length": np.int32,  # [completions]
    "longest": np.int32,  # [n] longest completion of the row, 0 where it has none
    "line": np.int64,  # [n]
    "key": np.dtype("S32"),  # [n]
    "extra_start": np.int64,  # [n + 1] into extra
    "extra": np.uint8,  # JSON of Example.extras, empty where there are none
}
_STALE_S = 86_400  # a draft that nobody has added a file to for a day


class Dataset:
    """Tokenised rows. Nothing but row lengths is in memory; a row is read from disk when asked for."""

    def __init__(self, folder: Path, meta: dict[str, Any]):
        self.folder = folder
        self.fingerprint: str = meta["fingerprint"]  # hash of content, tokenizer, template and settings that matter
        self.report: dict[str, Any] = meta["report"]  # counts: rows, dropped, truncated, tokens ...
        self._columns = {name: _open(folder / name, dtype) for name, dtype in COLUMNS.items()}
        self.prompt_lengths: np.ndarray = np.array(self._columns["prompt_length"])  # int32 [n]
        self.completion_lengths: np.ndarray = np.array(self._columns["longest"])  # int32 [n], longest of the row or 0
        self.num_completions: np.ndarray = np.diff(self._columns["completion_start"]).astype(np.int32)  # int32 [n]
        self.sizes: np.ndarray = np.diff(self._columns["row_start"]).astype(np.int32)  # int32 [n], tokens of the row

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> Example:
        i = range(len(self))[index]  # negative indices and IndexError as a list has them
        c = self._columns
        start, stop = c["row_start"][i : i + 2]
        tokens, mask = np.array(c["tokens"][start:stop]), np.array(c["mask"][start:stop])
        first, last = c["completion_start"][i : i + 2]
        cuts = np.cumsum([int(self.prompt_lengths[i]), *c["completion_length"][first:last]])
        completions = tuple(Completion(tokens[a:b], mask[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True))
        extra = bytes(c["extra"][slice(*c["extra_start"][i : i + 2])])
        extras = json.loads(extra) if extra else {}
        return Example(tokens[: cuts[0]], completions, int(c["line"][i]), c["key"][i].decode(), extras)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def find(fingerprint: str) -> Dataset | None:
    """The dataset of this fingerprint, or None where there is none or its bytes no longer match its checksums."""
    folder = cache_dir() / "data" / fingerprint
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["fingerprint"] == fingerprint and all(_checksum(folder / n) == meta["files"][n] for n in COLUMNS):
            return Dataset(folder, meta)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


class Writer:
    """Appends examples; `finish` publishes the folder. Leaving the `with` block before that removes it."""

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint
        self.target = cache_dir() / "data" / fingerprint
        self.folder = self.target.with_name(f".{fingerprint}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        self.rows = self.completions = self.tokens = self.trained = self.prompt_tokens = 0
        self._extra = 0
        self._files: dict[str, BinaryIO] = {}
        self._sums = {name: [0, 0] for name in COLUMNS}

    def __enter__(self) -> "Writer":
        with _said(self.target):
            for stale in self.target.parent.glob(f".{self.fingerprint}-*"):  # a process that was killed left it
                if time.time() - stale.stat().st_mtime > _STALE_S:
                    shutil.rmtree(stale, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._files = {name: open(self.folder / name, "wb") for name in COLUMNS}
        for name in ("row_start", "completion_start", "extra_start"):
            self._put(name, np.zeros(1, np.int64))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what a full disk did not take, it takes no better now
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already when `finish` has published it

    def add(self, examples: list[Example]) -> None:
        """Append rows. UserError where the disk is full."""
        if not examples:
            return
        pieces = [e.prompt for e in examples]
        tokens, masks, lengths, extras = [], [], [], []
        for prompt, completions, _, _, extra in examples:
            tokens += [prompt, *(c.tokens for c in completions)]
            masks += [np.zeros(len(prompt), bool), *(c.mask for c in completions)]
            lengths.append([len(c.tokens) for c in completions])
            extras.append(json.dumps(extra, default=_plain).encode() if extra else b"")
        prompts = np.array([len(p) for p in pieces])
        sizes = prompts + np.array([sum(row) for row in lengths])
        mask = np.concatenate(masks)
        self._put("tokens", np.concatenate(tokens))
        self._put("mask", mask)
        self._put("row_start", self.tokens + np.cumsum(sizes))
        self._put("prompt_length", prompts)
        self._put("completion_start", self.completions + np.cumsum([len(row) for row in lengths]))
        self._put("completion_length", np.array([n for row in lengths for n in row]))
        self._put("longest", np.array([max(row, default=0) for row in lengths]))
        self._put("line", np.array([e.line for e in examples]))
        self._put("key", np.array([e.key.encode() for e in examples], COLUMNS["key"]))
        self._put("extra_start", self._extra + np.cumsum([len(x) for x in extras]))
        self._put("extra", np.frombuffer(b"".join(extras), np.uint8))
        self.rows += len(examples)
        self.completions += sum(map(len, lengths))
        self.tokens += int(sizes.sum())
        self.prompt_tokens += int(prompts.sum())
        self.trained += int(mask.sum())
        self._extra += sum(map(len, extras))

    def finish(self, report: dict[str, Any]) -> Dataset:
        """Publish the folder under its fingerprint and open it."""
        with _said(self.target):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            meta = {"fingerprint": self.fingerprint, "files": self._sums, "report": report}
            (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))
            if self.target.exists():  # damaged, or written by another process just now: the same rows either way
                shutil.rmtree(self.target, ignore_errors=True)
            try:
                os.replace(self.folder, self.target)
            except OSError:
                if find(self.fingerprint) is None:
                    raise
        return Dataset(self.target, meta)

    def _put(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, COLUMNS[name]).tobytes()
        with _said(self.target):
            self._files[name].write(data)
        size, checksum = self._sums[name]
        self._sums[name] = [size + len(data), zlib.crc32(data, checksum)]


class _said:
    """Turns a full or read-only disk into one message."""

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):
            what = "Free some space, or set" if error.errno == errno.ENOSPC else "Set"
            raise UserError(
                f"cannot write tokenised data to {self.target.parent}: {error.strerror or error}. "
                f"{what} MLX_REALIGN_CACHE to another folder, which you may write to."
            ) from error


def _checksum(path: Path) -> list[int]:
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _open(path: Path, dtype: Any) -> np.ndarray:
    """A memory map; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _plain(value: Any) -> Any:
    """What JSON has no word for: numbers and arrays of numpy as Python's own, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
