# SPDX-License-Identifier: Apache-2.0
"""Time mlx-realign on one case of `workload.py`: a table, and as the last line of standard output one JSON object.

    python benchmarks/run.py --model MODEL --data FOLDER --case dpo-cached [--steps 8] [-- FLAGS OF mlx-realign train]

FOLDER comes from `make_pairs.py`. The trainer runs as a process of its own that starts with an empty cache folder:
nothing tokenised and no reference of an earlier run is reused.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import launch
import workload
from workload import CASES, Case


def train(case: Case, model: Path, data: Path, *, steps: int, flags: list[str] | None = None) -> launch.Run:
    """One run of `mlx_realign.train`; seconds and MLX's peak (of its steps) come from its metrics.jsonl.

    Our reference is computed when a row is first met and kept: the first epoch is the live case. For the cached case
    the same process goes on into a second epoch, and that one is timed; its memory is that of both.
    """
    first_epoch = epoch_steps(case, data) if case.reference == "cached" and case.goal != "epoch" else 0
    with tempfile.TemporaryDirectory() as scratch:
        output, cache = Path(scratch) / "output", Path(scratch) / "cache"
        command = [sys.executable, "-m", "mlx_realign.train", "--method", case.method]
        command += ["--model", model, "--data", data / case.rows_file, "--output", output]
        command += ["--steps", first_epoch + steps, "--batch-size", workload.BATCH]
        command += ["--max-length", workload.MAX_LENGTH, "--lora-rank", workload.RANK, "--lora-alpha", workload.ALPHA]
        command += ["--learning-rate", workload.LEARNING_RATE, "--lr-schedule", "constant", "--save-every", 1000]
        command += ["--grad-checkpoint"] if case.goal == "memory" else []
        _, wall, maxrss = launch.run([*map(str, command), *(flags or [])], {"MLX_REALIGN_CACHE": str(cache)})
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return launch.Run(
        steps_s=[row["step_s"] for row in rows[first_epoch:]],
        losses=[row["loss"] for row in rows],
        wall_s=wall,
        maxrss_gb=maxrss,
        mlx_peak_gb=max(row["peak_memory_gb"] for row in rows),
        notes={"live_step_s": statistics.median(row["step_s"] for row in rows[2:first_epoch])} if first_epoch else {},
    )


def epoch_steps(case: Case, data: Path) -> int:
    """Steps of one pass over the rows of a case."""
    return len((data / case.rows_file).read_text().splitlines()) // workload.BATCH


def summary(name: str, case: Case, run: launch.Run, flops: float, peak_gflops: float) -> dict[str, Any]:
    """One row of numbers: what JSON holds and the table shows."""
    seconds = run.wall_s if case.goal == "epoch" else run.step_s
    steps = len(run.steps_s) if case.goal == "epoch" else 1
    return {
        "contestant": name,
        "seconds": round(seconds, 3),
        "unit": "epoch" if case.goal == "epoch" else "step",
        "mlx_peak_gb": None if run.mlx_peak_gb is None else round(run.mlx_peak_gb, 3),
        "maxrss_gb": round(run.maxrss_gb, 3),
        "share_of_peak": round(flops * steps / seconds / 1e9 / peak_gflops, 3),
        "first_loss": round(run.losses[0], 5) if run.losses else None,
        "last_loss": round(run.losses[-1], 5) if run.losses else None,
        "wall_s": round(run.wall_s, 2),
        "steps_s": [round(s, 3) for s in run.steps_s],
        **run.notes,
    }


HEADER = ("", "seconds", "MLX peak GB", "max RSS GB", "of peak")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of numbers as text, in the columns of HEADER."""
    mlx = "-" if row["mlx_peak_gb"] is None else f"{row['mlx_peak_gb']:.2f}"
    share = f"{row['share_of_peak']:.0%}"
    return row["contestant"], f"{row['seconds']:.2f}", mlx, f"{row['maxrss_gb']:.2f}", share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--case", choices=list(CASES), default="dpo-cached")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("flags", nargs="*", help="after --: more flags of mlx-realign train")
    a = parser.parse_args()
    case = CASES[a.case]
    peak = launch.matmul_peak_gflops(Path(sys.executable))
    steps = epoch_steps(case, a.data) if case.goal == "epoch" else a.steps
    run = train(case, a.model, a.data, steps=steps, flags=a.flags)
    row = summary("mlx-realign", case, run, workload.flops_per_step(a.model, case, a.data), peak)
    print(f"{a.case}: {case.about}; matmul peak {peak:.0f} GFLOP/s")
    print(launch.table([HEADER, cells(row)]))
    print(json.dumps({"case": a.case, "matmul_peak_gflops": round(peak, 1), "machine": launch.machine(), **row}))


if __name__ == "__main__":
    main()
