# SPDX-License-Identifier: Apache-2.0
"""What large data costs: time and peak memory of loading files of many rows, of long rows and of long conversations.

    python tests/reliability/big_data.py                 # all: about 20 minutes and 4 GB of disk
    python tests/reliability/big_data.py rows turns      # some
    python tests/reliability/big_data.py file --mb 100   # the large file, smaller

Each case runs in a process of its own. Memory is the peak beyond what the process held before it loaded, in MB and as a
multiple of the file. Exit code 1 where a case exceeds the bound that is written beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlx_realign import data
from mlx_realign.config import TrainSettings
from mlx_realign.data.__main__ import _tokenizer
from mlx_realign.data.validate import validate

MB = 1e6
WORDS = "a cat sat on the mat and said that it would not move before noon".split()


def text(size: int) -> str:
    """About `size` characters of words."""
    said = " ".join(WORDS)
    return (said + " ") * (size // (len(said) + 1) + 1)


def large_file(mb: float) -> Iterator[dict]:
    """Rows of 2 kB, as many as fill the file."""
    said = text(2000)
    return ({"prompt": f"{i}: {said[:200]}", "completion": said} for i in range(int(mb * MB / 2300)))


def short_rows(_: float) -> Iterator[dict]:
    """A million rows of a few words."""
    return ({"prompt": f"What is {i} and 1?", "completion": str(i + 1)} for i in range(1_000_000))


def one_row(_: float) -> Iterator[dict]:
    """One row of 5 MB among short ones."""
    rows = [{"prompt": "a", "completion": "b"}] * 10
    return iter([*rows, {"prompt": "a", "completion": text(5_000_000)}, *rows])


def long_talk(turns: int) -> Iterator[dict]:
    """A conversation of many turns."""
    talk = []
    for i in range(turns):
        talk += [{"role": "user", "content": f"{i}: {text(100)}"}, {"role": "assistant", "content": text(150)}]
    return iter([{"messages": talk}])


# name -> (rows, command, most seconds, most memory in MB)
CASES = {
    "file": (large_file, "load", 3600, 700),
    "file-validate": (large_file, "validate", 3600, 900),
    "rows": (short_rows, "load", 900, 700),
    "row": (one_row, "load", 120, 900),
    "turns": (lambda _: long_talk(1000), "load", 30, 300),
    "turns-4000": (lambda _: long_talk(4000), "load", 120, 900),
}


def peak() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MB


def measure(path: Path, command: str, folder: Path) -> None:
    """Print one JSON object: seconds, memory_mb, rows."""
    tokenizer = _tokenizer("tiny-chat")
    first = folder / "first.jsonl"
    first.write_text('{"prompt": "a", "completion": "b"}\n')
    settings = TrainSettings(max_length=10**9)
    data.load(first, tokenizer, format="sft", settings=settings)
    before, began = peak(), time.perf_counter()
    if command == "load":
        rows = len(data.load(path, tokenizer, format="sft", settings=settings))
    else:
        rows = validate(path, "sft", tokenizer=tokenizer)["rows"]
    print(json.dumps({"seconds": time.perf_counter() - began, "memory_mb": peak() - before, "rows": rows}))


def run(name: str, mb: float) -> bool:
    """Make the file, measure in a child, print a line; whether it stayed in its bounds."""
    rows, command, most_seconds, most_mb = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(mb))
        size = path.stat().st_size / MB
        words = [sys.executable, __file__, "--measure", command, str(path)]
        environment = {"MLX_REALIGN_CACHE": str(Path(folder) / "cache")}
        child = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment)
        if child.returncode:
            print(f"{name}: exit code {child.returncode}: {child.stderr[-500:]}")
            return False
        found = json.loads(child.stdout.splitlines()[-1])
    held = found["seconds"] <= most_seconds and found["memory_mb"] <= most_mb
    print(
        f"{name}: {size:.1f} MB, {found['rows']} rows: {found['seconds']:.1f} s, {found['memory_mb']:.0f} MB "
        f"({found['memory_mb'] / size:.2f} times the file); {'holds' if held else 'TOO MUCH'}",
        flush=True,
    )
    return held


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; all where none is named")
    parser.add_argument("--mb", type=float, default=1000, help="size of the large file")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        path = Path(words.measure[1])
        measure(path, words.measure[0], path.parent)
        return 0
    if unknown := set(words.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)[0]}")
    return 0 if all([run(name, words.mb) for name in words.cases or CASES]) else 1


if __name__ == "__main__":
    sys.exit(main())
