# SPDX-License-Identifier: Apache-2.0
"""One CPU stream per core: MLX runs everything but matmuls on a single thread of a CPU, so a batch is cut into parts.

MLX binds streams to threads and orders one evaluation as one tape; parts overlap only when each has its own thread.
Graphs are built under a lock, since building exchanges the model's parameters; evaluation runs outside of it. A GPU
gets one part and no thread.

MLX lets all streams together have ten groups of operations under way. A stream that has filled them keeps the others
waiting with nothing to do, so a part is evaluated in stretches too short for that (`stretch`): a fifth less time.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from . import blas
from .batch import Batch

Part = TypeVar("Part")

_own = threading.local()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stretch(*arrays: mx.array) -> None:
    """Said while a part's graph is built, in the order of its evaluation: evaluate up to here, then go on."""
    if hasattr(_own, "stretches"):
        _own.stretches.append(arrays)


class Workers:
    """Runs a function over the parts of a batch and gives back what it made, evaluated."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(count) if count > 1 else None
        if self.pool:
            blas.keep_freed_memory()
        self.lock = threading.Lock()

    def map(self, batch: Batch, build: Callable[[Batch], Any]) -> list[Any]:
        """`build` makes arrays (lazily) from a part of the batch; one result per part, all evaluated."""
        return self.each([batch] if self.pool is None else split(batch, self.count), build)

    def each(self, parts: list[Part], build: Callable[[Part], Any]) -> list[Any]:
        """As `map`, of parts that are cut already."""
        if self.pool is None:
            built = [build(part) for part in parts]
            mx.eval(built)
            return built
        blas.set_threads(max(1, self.count // len(parts)))
        try:
            return [future.result() for future in [self.pool.submit(self._run, part, build) for part in parts]]
        finally:
            blas.set_threads()

    def _run(self, part: Part, build: Callable[[Part], Any]) -> Any:
        if not hasattr(_own, "stream"):
            _own.stream = mx.new_stream(mx.cpu)
        with mx.stream(_own.stream):
            with self.lock:
                _own.stretches = []
                built = build(part)
            stretches = _own.stretches[::-1]
            del _own.stretches
            while stretches:  # taken off the list, or it would keep activations alive
                mx.eval(stretches.pop())
            mx.eval(built)
        return built


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch cut between prompts into at most `parts` of near equal work, each without columns nobody uses."""
    pad, rows, mask, tokens, prompt = (
        np.array(x) for x in (batch.prompt_pad, batch.row_prompt, batch.mask, batch.completion, batch.prompt)
    )
    lengths = np.where(mask.any(1), mask.shape[1] - np.argmax(mask[:, ::-1], 1), 1)
    cost = (prompt.shape[1] - pad) + np.bincount(rows, lengths, minlength=len(prompt))
    part_of = ((np.cumsum(cost) - cost / 2) * parts / cost.sum()).astype(int)
    found = []
    for part in np.unique(part_of):
        mine = np.flatnonzero(part_of == part)
        own = np.flatnonzero((rows >= mine[0]) & (rows <= mine[-1]))
        width, skip = int(lengths[own].max()), int(pad[mine].min())
        kept = mask[own, :width]
        arrays = (
            prompt[mine, skip:],
            pad[mine] - skip,
            tokens[own, :width],
            rows[own] - mine[0],
            kept,
            np.flatnonzero(kept),
        )
        extras = {name: _part(value, mine, own, len(prompt), len(rows), width) for name, value in batch.extras.items()}
        made = [mx.array(x if x.dtype == bool else x.astype(np.int32)) for x in arrays]
        found.append(Batch(*made, extras=extras))
    return found


def _part(
    value: mx.array, prompts: np.ndarray, rows: np.ndarray, all_prompts: int, all_rows: int, width: int
) -> mx.array:
    """Rows of an extra that has entries per completion (or per token of it) or per prompt; anything else whole."""
    array = np.array(value)
    if array.ndim and len(array) == all_rows:
        array = array[rows][:, :width] if array.ndim > 1 else array[rows]
    elif array.ndim and len(array) == all_prompts:
        array = array[prompts]
    return mx.array(array)
