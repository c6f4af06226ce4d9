# SPDX-License-Identifier: Apache-2.0
"""What the tests of the loop share: rows of unequal length, runs in this process or another one, files compared."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_realign.train import main

ROOT = Path(__file__).parent.parent
MEASURED = ("tokens_per_second", "step_s", "peak_memory_gb")  # of a row of metrics: no two runs share these
FAST = ("--learning-rate", 1e-3, "--batch-size", 2)


class Run(NamedTuple):
    """A finished call of train."""

    code: int
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Its rows of optimizer steps, without what is measured."""
        rows = [row for row in self.rows if "loss" in row]
        return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Its rows of evaluations."""
        return [row for row in self.rows if "eval_loss" in row]

    @property
    def adapter(self) -> bytes:
        """The result, byte for byte."""
        return (self.folder / "adapters.safetensors").read_bytes()

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints there are."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*"))


def pair_rows(count: int) -> list[dict[str, str]]:
    """Preference pairs whose prompts and completions differ in length."""
    return [
        {
            "prompt": f"Name the number after {i}." + " Think." * (i % 3),
            "chosen": f"It is {i + 1}." + " Yes." * (i % 4),
            "rejected": f"No idea, {i}?" + " Hm" * ((i * 7) % 5),
        }
        for i in range(count)
    ]


def sft_rows(count: int) -> list[dict[str, str]]:
    """Prompts and completions of 2 to 40 tokens."""
    return [{"prompt": f"Say {i}", "completion": f"{i}" + " well" * ((i * 3) % 8)} for i in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(folder: Path, model: Path, data: Path, *words: object, method: str = "dpo") -> list[str]:
    """The command line of a run; a later flag of the same name wins."""
    start = ["--method", method, "--model", model, "--data", data, "--output", folder, *FAST]
    rank = () if "--adapter" in words else ("--lora-rank", 4)
    return [str(word) for word in (*start, *rank, *words)]


def launch(folder: Path, model: Path, data: Path, *words: object, method: str = "dpo") -> Run:
    """Train in this process, with a cache beside the output folder."""
    with cache(folder.parent / "cache"):
        return Run(main(words_of(folder, model, data, *words, method=method)), folder)


def start_process(folder: Path, model: Path, data: Path, *words: object, method: str = "dpo") -> subprocess.Popen[str]:
    """Train in another process."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_realign.train", *words_of(folder, model, data, *words, method=method)],
        cwd=ROOT,
        env=os.environ | {"MLX_REALIGN_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def cache(folder: Path) -> Iterator[None]:
    """Inside, tokenised data and reference log-probs are kept in this folder."""
    before = os.environ.get("MLX_REALIGN_CACHE")
    os.environ["MLX_REALIGN_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLX_REALIGN_CACHE"]
        else:
            os.environ["MLX_REALIGN_CACHE"] = before


def tensors(folder: Path) -> dict[str, mx.array]:
    """The adapter of a folder."""
    found = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(found, dict)
    return found


def largest_difference(a: dict[str, mx.array], b: dict[str, mx.array]) -> float:
    """Between two sets of arrays, relative to the largest entry of each array."""
    assert a.keys() == b.keys()
    gaps = [mx.abs(a[k] - b[k]).max() / mx.maximum(mx.abs(a[k]).max(), 1e-12) for k in a]
    return float(np.array(mx.stack(gaps)).max())
