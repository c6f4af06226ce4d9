# SPDX-License-Identifier: Apache-2.0
"""Run one contestant as a process of its own and say what it took. Standard library only: a child's ru_maxrss starts at
its parent's, so the process that starts them has to stay small."""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workload import WARM_UP_STEPS

GRACE_S = 30.0  # from SIGTERM to SIGKILL
PEAK = """
import time, mlx_realign, mlx.core as mx
a, b = (mx.random.normal((2048, 2048)) for _ in "ab")
mx.eval(a @ b)
best = 1e9
for _ in range(10):
    start = time.perf_counter(); mx.eval(a @ b); best = min(best, time.perf_counter() - start)
print(2 * 2048**3 / best / 1e9)
"""


@dataclass(frozen=True)
class Run:
    """What one process took. GB are 1e9 bytes; seconds of a step include reading its batch."""

    steps_s: list[float]
    losses: list[float]
    wall_s: float  # from the start of the process to its end
    maxrss_gb: float
    mlx_peak_gb: float | None  # None: not MLX
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """Median over the steps after the warm-up."""
        return statistics.median(self.steps_s[WARM_UP_STEPS:] or self.steps_s)


class Failed(Exception):
    """A contestant ended with another code than 0."""


class Late(Failed):
    """A contestant was told to end when its time was over."""


def run(
    command: Sequence[str | Path],
    environment: dict[str, str] | None = None,
    *,
    limit: float | None = None,
    watch: Callable[[int], None] = lambda pid: None,
) -> tuple[str, float, float]:
    """Standard output, wall seconds and largest resident set (GB) of a command; raises Failed with its last lines.

    After `limit` seconds it gets SIGTERM, and Late is raised. `watch` is called every second with its process id. It
    is a session of its own: where this process is interrupted, it is ended with all that it started.
    """
    words, over = [str(word) for word in command], threading.Event()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        late: list[bool] = []
        try:
            threading.Thread(target=_look_after, args=(child.pid, over, limit, watch, late), daemon=True).start()
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            end(child)
            raise
        finally:
            over.set()
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text = out.read()
        if child.returncode or late:
            tail = "\n".join((text + err.read()).splitlines()[-15:])
            why = f"ended with {child.returncode}: {tail.splitlines()[-1] if tail else ''}"
            why = f"not done after {limit:g} s" if late else why
            raise (Late if late else Failed)(f"{' '.join(words)}\n{tail}\n{why}")
    return text, wall, peak_gb(usage)


def _look_after(
    pid: int, over: threading.Event, limit: float | None, watch: Callable[[int], None], late: list[bool]
) -> None:
    began = time.perf_counter()
    ends = [] if limit is None else [(limit, signal.SIGTERM), (limit + GRACE_S, signal.SIGKILL)]
    while not over.wait(min(1.0, max(0.01, ends[0][0] - (time.perf_counter() - began))) if ends else 1.0):
        watch(pid)
        if ends and time.perf_counter() - began >= ends[0][0]:
            late.append(True)
            _signal(pid, ends.pop(0)[1])


def end(child: subprocess.Popen) -> None:
    """SIGTERM first, because a process killed hard may leave a Mac's wired memory behind; SIGKILL after a while."""
    _signal(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal(child.pid, signal.SIGKILL)
        child.wait()


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def peak_gb(usage: resource.struct_rusage) -> float:
    """Largest resident set in GB of 1e9 bytes: macOS counts bytes, Linux KiB."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def last_json(text: str) -> dict[str, Any]:
    """The JSON object that a driver prints as its last line."""
    return json.loads(text.strip().splitlines()[-1])


def matmul_peak_gflops(python: Path) -> float:
    """Best of ten 2048 x 2048 float32 products with the BLAS that mlx-realign uses, GFLOP/s."""
    return float(run([python, "-c", PEAK])[0].split()[-1])


def fast_blas(python: Path) -> str:
    """The file of the BLAS that mlx-realign uses; empty where it is MLX's own."""
    text, _, _ = run([python, "-c", "import mlx_realign.blas as blas; print('=' + blas.in_use().path)"])
    return text.strip().splitlines()[-1][1:]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        lines.append(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Processor, cores and system of this machine."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    elif sys.platform == "darwin":
        model = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return {"processor": model, "cores": os.cpu_count(), "system": sys.platform}
