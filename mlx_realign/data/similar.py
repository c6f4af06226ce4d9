# SPDX-License-Identifier: Apache-2.0
"""Rows that repeat each other, and rows that repeat an evaluation file. Kept per row: a sketch, or nothing."""

import heapq
import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import UserError
from . import source as sources
from .formats import Row, as_messages
from .messages import Message, RowError

NGRAM = 13  # words; GPT-3's measure of contamination, arXiv:2005.14165, appendix C
_SHINGLE, _HASHES = 5, 128  # tokens of a shingle, minima of a sketch: its error is 0.03 at a similarity of 0.85
_SHOWN = 10
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_TOKEN = re.compile(rf"{_WORD.pattern}|[^\w\s]")  # with signs: 2 + 2 is not 2 - 2
_MIX = np.random.default_rng(0).integers(0, 2**63, NGRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class NearDuplicates:
    """Rows that nearly repeat an earlier one: MinHash sketches in a locality-sensitive index, compared when they meet.

    The similarity of two rows is the smaller of two Jaccard similarities of 5-token shingles: of the whole rows, and of
    their completions alone, so that rows which only share a long prompt are not duplicates.
    """

    def __init__(self, threshold: float):
        self.threshold, self.count, self.rows = threshold, 0, 0
        self.first: list[tuple[int, int, float]] = []  # (line, earlier line, similarity), the first few
        self._lines, self._sketches = array("q"), []  # of the rows that repeat none, by their number in the index
        self._new: Any = None  # makes an empty sketch
        try:
            from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        except ImportError:
            return
        self._new, self._index = RMinHash, RMinHashLSH(threshold, _HASHES, bands(threshold))

    @property
    def available(self) -> bool:
        """Whether the library that makes the sketches is there."""
        return self._new is not None

    def add(self, line: int, row: Row) -> None:
        """Count the row if it repeats an earlier one, else remember it."""
        self.rows += 1
        if not self.available:
            return
        prompt, completions = _texts(row)
        tokens = [_TOKEN.findall(text.casefold()) for text in (*prompt, *completions)]
        whole = self._sketch(tokens)
        sketch = np.array([whole.digest(), self._sketch(tokens[len(prompt) :]).digest()], np.uint32).astype(np.uint16)
        near = [(float((sketch == self._sketches[k]).mean(axis=1).min()), -k) for k in self._index.query(whole)]
        similarity, earlier = max(near, default=(0.0, 0))
        if similarity < self.threshold:
            self._index.insert(len(self._lines), whole)
            self._lines.append(line)
            self._sketches.append(sketch)
            return
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append((line, self._lines[-earlier], similarity))

    def _sketch(self, texts: list[list[str]]) -> Any:
        sketch = self._new(_HASHES, 0)
        for tokens in texts:
            sketch.update([" ".join(tokens[i : i + _SHINGLE]) for i in range(max(len(tokens) - _SHINGLE, 0) + 1)])
        return sketch


class Overlap:
    """Rows that have 13 words in a row in common with an evaluation file, whatever its format."""

    def __init__(self, file: str):
        source = sources.resolve(file, "test")
        self.name, self.count, self.rows = file, 0, 0
        self.worst: list[tuple[int, int]] = []  # (13-grams shared, line): a heap of the few that share most
        self.eval_rows, self.short = 0, 0
        found = [np.zeros(0, np.uint64)]
        for line, value in sources.read(source):
            if isinstance(value, RowError):
                raise UserError(f"--overlap-with {file}: line {line}: {value}")
            grams = [_grams(text) for text in _strings(value)]
            self.eval_rows += 1
            self.short += not sum(map(len, grams))
            found += grams
        if not self.eval_rows:
            raise UserError(f"--overlap-with {file}: the file is empty")
        self.known = np.unique(np.concatenate(found))  # uint64, sorted

    def add(self, line: int, row: Row) -> None:
        """Count the row if it shares a 13-gram."""
        self.rows += 1
        prompt, completions = _texts(row)
        grams = np.unique(np.concatenate([_grams(text) for text in (*prompt, *completions)]))
        if not len(self.known) or not len(grams):
            return
        at = np.minimum(np.searchsorted(self.known, grams), len(self.known) - 1)
        shared = int((self.known[at] == grams).sum())
        if shared:
            self.count += 1
            add = heapq.heappush if len(self.worst) < _SHOWN else heapq.heappushpop
            add(self.worst, (shared, -line))


def bands(threshold: float) -> int:
    """Bands of the index with which two rows at the threshold meet with a probability above 0.99."""
    powers = [2**n for n in range(_HASHES.bit_length())]
    return next((b for b in powers if (1 - threshold ** (_HASHES / b)) ** b < 0.01), _HASHES)


def _grams(text: str) -> np.ndarray:
    """uint64 hashes of every 13 words in a row, signs and case left out."""
    words = _WORD.findall(text.casefold())
    if len(words) < NGRAM:
        return np.zeros(0, np.uint64)
    codes = np.array([hash(word) for word in words], np.int64).view(np.uint64)
    return np.lib.stride_tricks.sliding_window_view(codes, NGRAM) @ _MIX


def _texts(row: Row) -> tuple[list[str], list[str]]:
    """What is said in the prompt, and in the completions."""
    prompt, completions = as_messages(row)
    return _said([] if row.text else prompt), _said([m for c in completions for m in c])


def _said(messages: list[Message]) -> list[str]:
    return [message.get("content") or "" for message in messages]


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
