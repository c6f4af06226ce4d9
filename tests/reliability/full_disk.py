# SPDX-License-Identifier: Apache-2.0
"""A disk that is full at one write after the other: one message, code 1, and with more room the run goes on as before.

    unshare -rm python tests/reliability/full_disk.py

Linux only: disks of all sizes are tmpfs mounts, which root may make, or anybody in namespaces of his own (`unshare`).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Bench, table

CASES = (("dpo", ()), ("sft", ("--full",)), ("grpo", ()))
CACHE = "the disk of the cache"  # and not of the output: then a run goes on without it


def kilobytes(folder: Path) -> int:
    """What a folder takes of a disk."""
    return int(subprocess.run(["du", "-sk", folder], capture_output=True, text=True, check=True).stdout.split()[0])


def tried(bench: Bench, disk: Path, method: str, more: tuple[str, ...], parts: int) -> list[list[object]]:
    """A row for each size, from one that holds nothing to one that nearly holds all."""
    steps = ("--steps", 4, "--save-every", 1, "--keep", 9, *more)
    result = "model/model.safetensors" if "--full" in more else "adapters.safetensors"
    straight = bench.folder / f"straight-{method}"
    bench.start(bench.words(method, straight, *steps)).communicate(timeout=300)
    whole, found = kilobytes(straight), []
    for part in range(parts):
        size = max(8, whole * part // parts)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
        try:
            process = bench.start(bench.words(method, disk / "out", *steps))
            _, said = process.communicate(timeout=300)
            subprocess.run(["mount", "-o", f"remount,size={8 * whole}k", str(disk)], check=True)
            begun = (disk / "out" / "metrics.jsonl").exists()
            again = bench.start(bench.words(method, disk / "out", *steps, *(["--resume"] if begun else [])))
            _, later = again.communicate(timeout=300)
            made = disk / "out" / result
            same = made.exists() and made.read_bytes() == (straight / result).read_bytes()
            one_line = "Traceback" not in said and len(said.strip().splitlines()) == 1
            found.append([" ".join((method, *more)), size, process.returncode, one_line, again.returncode, same])
            if not (one_line and same and process.returncode in (1, 2)):
                print(said[-600:], later[-600:], sep="\n", file=sys.stderr)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return found


def without_cache(bench: Bench, disk: Path, parts: int) -> list[list[object]]:
    """A row for each size of a disk that holds the cache: tokenised rows, reference log-probs."""
    straight, found = bench.folder / "straight-dpo" / "adapters.safetensors", []
    for part in range(parts):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * (part + 1)}k", "tmpfs", str(disk)], check=True)
        try:
            output = bench.folder / f"cached-{part}"
            process = bench.start(bench.words("dpo", output, "--steps", 4, "--save-every", 1, "--keep", 9), disk)
            _, said = process.communicate(timeout=300)
            words, code, later = bench.words("dpo", output, "--steps", 4, "--save-every", 1, "--keep", 9), "-", ""
            if process.returncode:
                again = bench.start(words)
                later, code = again.communicate(timeout=300)[1], again.returncode
            made = output / straight.name
            same = made.exists() and made.read_bytes() == straight.read_bytes()
            one_line = "Traceback" not in said and len(said.strip().splitlines()) <= 1
            found.append([f"dpo, {CACHE}", 4 * (part + 1), process.returncode, one_line, code, same])
            if not same:
                print(said[-600:], later[-600:], sep="\n", file=sys.stderr)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return found


def main() -> int:
    """Print a table; 1 where a run was not told in a line, or did not go on to the same result."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--parts", type=int, default=10, help="sizes of the disk for each method")
    given = asked.parse_args()
    if not shutil.which("mount"):
        print("needs mount")
        return 2
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as disk:
        bench = Bench(Path(folder))
        found = [row for method, more in CASES for row in tried(bench, Path(disk), method, more, given.parts)]
        found += without_cache(bench, Path(disk), 4)
    print(table(["run", "disk in kB", "exit code", "one line", "with room", "result byte for byte"], found))
    return int(not all(row[3] and row[5] and (row[2] == 0 or row[2] in (1, 2) and row[4] == 0) for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
