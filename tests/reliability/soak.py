# SPDX-License-Identifier: Apache-2.0
"""Five hundred steps of sft, dpo and grpo: memory, files and threads must stay where they were after the first fifty.

python tests/reliability/soak.py --steps 500
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Bench, table

GROWTH = 1.05  # of the memory that is held after a tenth of the steps
OPEN = 2  # files that may just be open: a checkpoint is written now and then
METHODS = ("sft", "dpo", "grpo")


def state(pid: int) -> tuple[float, int, int, int]:
    """Resident memory in MB, open files, threads, children of a process."""
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    files = len(os.listdir(f"/proc/{pid}/fd")) if Path("/proc").exists() else -1
    threads = len(os.listdir(f"/proc/{pid}/task")) if Path("/proc").exists() else -1
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return int(said or 0) / 1024, files, threads, len(children)


def soaked(bench: Bench, method: str, steps: int) -> list[object]:
    """Watch one run."""
    output = bench.folder / f"out-{method}"
    process = bench.start(bench.words(method, output, "--steps", steps, "--save-every", 25, "--json"))
    seen: dict[int, tuple[float, int, int, int]] = {}
    assert process.stdout
    for line in process.stdout:
        if '"step": ' not in line or '"loss"' not in line:
            continue
        step = int(line.split('"step": ')[1].split(",")[0])
        if step in (steps // 10, steps // 2, steps - 1):
            seen[step] = state(process.pid)
    _, said = process.communicate(timeout=60)
    if process.returncode or len(seen) < 3:
        print(said[-500:], file=sys.stderr)
        return [method, process.returncode, *["-"] * 5, False]
    first, last = seen[steps // 10], seen[steps - 1]
    held = last[0] <= first[0] * GROWTH and all(b <= a + OPEN for a, b in zip(first[1:], last[1:], strict=True))
    counts = [f"{a} -> {b}" for a, b in zip(first[1:], last[1:], strict=True)]
    return [method, process.returncode, f"{first[0]:.0f} MB", f"{last[0]:.0f} MB", *counts, held]


def main() -> int:
    """Print a table; 1 where anything grew."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--steps", type=int, default=500)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        found = [soaked(bench, method, given.steps) for method in METHODS]
    head = ["run", "exit code", "memory after a tenth", "at the end", "open files", "threads", "processes", "held"]
    print(table(head, found))
    return int(not all(row[-1] and row[1] == 0 for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
