# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF files, every number held against the size of the file: a reader that trusts them ends the process.

Versions 2 and 3, little-endian; tensors of float32 and float16.
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .untrusted import require_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value type
STRING, ARRAY = 8, 9
FLOATS = {0: "<f4", 1: "<f2"}  # tensor type -> NumPy's
ITEMS = 2_000_000  # strings and values that are stepped through; a model's vocabulary and merges are below 1,000,000
DIMENSIONS = 4
DEEP = 8  # arrays in arrays


class File(NamedTuple):
    """What is in a GGUF file."""

    facts: dict[str, Any]  # metadata: numbers, strings; None for an array
    tensors: dict[str, np.ndarray]  # those that were asked for, float32 or float16, in NumPy's order of dimensions


class _Cursor:
    """Takes what is next in a file that may end before; ValueError where it does."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.items = data, 0, 0

    def number(self, form: str) -> Any:
        size = struct.calcsize("<" + form)
        self.skip(size)
        return struct.unpack_from("<" + form, self.data, self.at - size)[0]

    def skip(self, count: int) -> None:
        self.items += 1
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes are claimed at byte {self.at}, and the file has {len(self.data)}")
        if self.items > ITEMS:
            raise ValueError(f"it claims more than {ITEMS} entries")
        self.at += count

    def text(self) -> str:
        size = self.number("Q")
        self.skip(size)
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(_form(kind))
        return self.skip_array()

    def skip_array(self, depth: int = 1) -> None:
        kind, count = self.number("I"), self.number("Q")
        if depth > DEEP:
            raise ValueError(f"arrays stand in one another more than {DEEP} deep")
        if kind not in (STRING, ARRAY):
            self.skip(count * struct.calcsize("<" + _form(kind)))
            return
        for _ in range(min(count, ITEMS)):
            self.skip_array(depth + 1) if kind == ARRAY else self.skip(self.number("Q"))


def read(path: Path, prefix: str) -> File:
    """Metadata, and the tensors whose names begin with `prefix`.

    ValueError says what is wrong with the file; OSError where it cannot be read.
    """
    if require_regular(path) < 24:
        raise ValueError("it is shorter than any header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(_Cursor(data), prefix)


def _read(cursor: _Cursor, prefix: str) -> File:
    size = len(cursor.data)
    if cursor.data[:4] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    cursor.skip(4)
    if (version := cursor.number("I")) not in VERSIONS:
        raise ValueError(f"version {version}, and 2 and 3 are read here")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if tensors > size // 24 or keys > size // 12:  # none takes fewer bytes
        raise ValueError(f"{tensors} tensors and {keys} metadata keys are claimed in {size} bytes")
    facts: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text()
        facts[name] = cursor.value()
    found: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(tensors):
        name, dimensions = cursor.text(), cursor.number("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = [cursor.number("Q") for _ in range(dimensions)]
        told = shape[::-1], cursor.number("I"), cursor.number("Q")
        if name in found:
            raise ValueError(f"tensor {name!r} is there twice")
        if name.startswith(prefix):
            found[name] = told
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    if 2 * sum(prod(shape) for shape, _, _ in found.values()) > size:
        raise ValueError(f"its tensors claim more than the {size} bytes it has")
    return File(facts, {name: _tensor(cursor.data, start, name, *told) for name, told in found.items()})


def _form(kind: int) -> str:
    if kind not in FORMS:
        raise ValueError(f"a value of type {kind}, which is unknown")
    return FORMS[kind]


def _tensor(data: mmap.mmap, start: int, name: str, shape: list[int], kind: int, offset: int) -> np.ndarray:
    if kind not in FLOATS:
        raise ValueError(f"tensor {name!r} is of type {kind}, and 0 (float32) and 1 (float16) are read here")
    begin, dtype = start + offset, np.dtype(FLOATS[kind])
    end = begin + prod(shape) * dtype.itemsize
    if end > len(data):
        raise ValueError(f"tensor {name!r} of shape {shape} at byte {begin} ends behind the file")
    return np.frombuffer(data[begin:end], dtype).reshape(shape)
