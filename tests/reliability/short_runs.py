# SPDX-License-Identifier: Apache-2.0
"""Many short runs of every method, some beside busy processes: each must end with code 0 and its result.

python tests/reliability/short_runs.py --runs 200 --loaded 60
"""

import argparse
import collections
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import METHODS, Bench, table

ARCHITECTURES = ("llama", "mamba2", "gemma3_text", "qwen3_moe")


def main() -> int:
    """Run them two at a time and print how they ended."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--runs", type=int, default=200, help="runs in all")
    asked.add_argument("--loaded", type=int, default=60, help="of them dpo, beside busy processes")
    given = asked.parse_args()
    began, ended = time.monotonic(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        benches = [Bench(Path(folder) / arch, arch) for arch in ARCHITECTURES]
        for kind, count in (("dpo, loaded", given.loaded), ("all methods", given.runs - given.loaded)):
            loads = range(0 if kind == "all methods" else 3)
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in loads]
            try:
                for first in range(0, count, 2):
                    running = []
                    for i in range(first, min(first + 2, count)):
                        method = "dpo" if busy else METHODS[i % len(METHODS)]
                        bench, output = benches[i // 2 % len(benches)], Path(folder) / f"out-{i}"
                        shutil.rmtree(output, ignore_errors=True)
                        running.append((method, output, bench.start(bench.words(method, output, "--steps", 2))))
                    for method, output, process in running:
                        _, said = process.communicate(timeout=300)
                        whole = (output / "adapters.safetensors").exists()
                        ended[kind, method, process.returncode, whole] += 1
                        if process.returncode or not whole:
                            print(method, process.returncode, said[-500:], file=sys.stderr)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    print(table(["runs", "method", "exit code", "result", "count"], [[*key, n] for key, n in sorted(ended.items())]))
    bad = sum(n for (_, _, code, whole), n in ended.items() if code or not whole)
    print(f"{sum(ended.values())} runs, {bad} bad, in {time.monotonic() - began:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
