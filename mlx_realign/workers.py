# SPDX-License-Identifier: Apache-2.0
"""One CPU stream per core: MLX runs everything but matmuls on a single thread of a CPU, so a batch is cut into parts.

MLX orders one evaluation as one tape, so parts overlap only when each is evaluated by a thread of its own. Their graphs
are built by the caller, since building exchanges the model's parameters and calls functions under `mx.compile`. A
thread that has called one keeps Python objects in a cache of MLX's, which asks for the interpreter when the thread
ends; at the end of a program there is none, and the process aborts. A GPU gets one part and no thread.

MLX lets all streams together have ten groups of operations under way. A stream that has filled them keeps the others
waiting with nothing to do, so a part is evaluated in stretches too short for that (`stretch`): a fifth less time.
"""

import atexit
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from . import blas
from .batch import Batch

Part = TypeVar("Part")

_own = threading.local()
_guests: set[int] = set()  # the system's numbers of the caller's own threads that compute
ENDING_S = 2.0


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def known_thread() -> None:
    """Said in any thread that calls compiled functions: the program then waits at its end until that thread is gone.

    Python's join returns before the system's thread has ended, and with it its cache.
    """
    if threading.current_thread() is not threading.main_thread():
        _guests.add(threading.get_native_id())


@atexit.register
def _wait_for_guests() -> None:
    """While there is an interpreter to ask for; a thread that still runs is its owner's business."""
    tasks, until = Path("/proc/self/task"), time.monotonic() + ENDING_S
    ending = _guests - {thread.native_id for thread in threading.enumerate()}
    if not tasks.exists():
        time.sleep(0.05 * bool(ending))
        return
    while any((tasks / str(number)).exists() for number in ending) and time.monotonic() < until:
        time.sleep(0.001)


def stretch(*arrays: mx.array) -> None:
    """Said while a part's graph is built, in the order of its evaluation: evaluate up to here, then go on."""
    if hasattr(_own, "stretches"):
        _own.stretches.append(arrays)


class Workers:
    """Runs a function over the parts of a batch and gives back what it made, evaluated."""

    def __init__(self, count: int) -> None:
        known_thread()
        self.count = count
        self.pool = ThreadPoolExecutor(count) if count > 1 else None
        if self.pool:
            blas.keep_freed_memory()

    def map(self, batch: Batch, build: Callable[[Batch], Any], *, wait: bool = True) -> list[Any]:
        """`build` makes arrays (lazily) from a part of the batch; one result per part, all evaluated.

        wait: False leaves that to the caller where there is one worker.
        """
        whole = self.pool is None or bool(batch.strips)  # that is a part already
        if self.pool is None and not wait:
            known_thread()
            return [build(batch)]
        return self.each([batch] if whole else split(batch, self.count), build)

    def each(self, parts: list[Part], build: Callable[[Part], Any]) -> list[Any]:
        """As `map`, of parts that are cut already."""
        known_thread()
        if self.pool is None:
            built = [build(part) for part in parts]
            mx.eval(built)
            return built
        blas.set_threads(max(1, self.count // len(parts)))
        made, under_way = [], []
        try:
            for i, part in enumerate(parts):
                _own.stretches = stretches = []
                try:
                    with mx.stream(_stream(i)):
                        made.append(build(part))
                finally:
                    del _own.stretches
                under_way.append(self.pool.submit(_evaluate, stretches[::-1], made[-1]))
                stretches.clear()
            for future in under_way:
                future.result()
            return made
        finally:
            wait(under_way)
            blas.set_threads()


def _evaluate(stretches: list[tuple[mx.array, ...]], built: Any) -> None:
    while stretches:  # taken off the list, or it would keep activations alive
        mx.eval(stretches.pop())
    mx.eval(built)


def _stream(number: int) -> mx.Stream:
    """The CPU stream of a part's number, for graphs that this thread builds and another evaluates."""
    streams: list[mx.Stream] = _own.__dict__.setdefault("streams", [])
    while len(streams) <= number:
        streams.append(mx.new_thread_unsafe_stream(mx.cpu))
    return streams[number]


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch cut between prompts into at most `parts` of near equal work, each without columns nobody uses."""
    pad, rows, mask, tokens, prompt = (
        np.array(x) for x in (batch.pad, batch.row_prompt, batch.mask, batch.completion, batch.prompt)
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
        part = Batch(*made, extras=extras)
        exact = batch.prompt_pad is None
        found.append(part._replace(prompt_pad=None, lead=batch.ahead[mx.array(mine)]) if exact else part)
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
