# SPDX-License-Identifier: Apache-2.0
"""Time mlx-realign on cases of `workload.py`: a table, and as the last line of standard output one JSON object.

    python benchmarks/run.py --model MODEL --data FOLDER --case dpo-cached [--steps 8] [-- FLAGS OF mlx-realign train]
    python benchmarks/run.py --model MODEL --data FOLDER --case dpo-cached,dpo-rejected3 --rounds 2

FOLDER comes from `make_pairs.py`. The trainer runs as a process of its own that starts with an empty cache folder:
nothing tokenised and no reference of an earlier run is reused. Several cases run in turn in every round; the numbers
are medians over rounds, and the last columns divide each by the first case.
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
        command += ["--nll-on-prompt"] if case.nll_on_prompt else []
        _, wall, maxrss = launch.run([*map(str, command), *(flags or [])], {"MLX_REALIGN_CACHE": str(cache)})
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    live = [row["step_s"] for row in rows[:first_epoch]]
    live = live[workload.WARM_UP_STEPS :] or live
    return launch.Run(
        steps_s=[row["step_s"] for row in rows[first_epoch:]],
        losses=[row["loss"] for row in rows],
        wall_s=wall,
        maxrss_gb=maxrss,
        mlx_peak_gb=max(row["peak_memory_gb"] for row in rows),
        notes={"live_step_s": statistics.median(live)} if first_epoch else {},
    )


def epoch_steps(case: Case, data: Path) -> int:
    """Steps of one pass over the rows of a case."""
    return len((data / case.rows_file).read_text().splitlines()) // workload.BATCH


def summary(name: str, case: Case, run: launch.Run, flops: float, peak_gflops: float) -> dict[str, Any]:
    """One run as numbers."""
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


def medians(runs: list[dict], flops: float, peak: float, steps: int, case: Case) -> dict[str, Any]:
    """Several runs of the same as numbers: what JSON holds and a table shows."""
    middle = {key: statistics.median(r[key] for r in runs) for key in ("seconds", "maxrss_gb", "wall_s")}
    mlx = [r["mlx_peak_gb"] for r in runs if r["mlx_peak_gb"] is not None]
    work = flops * (steps if case.goal == "epoch" else 1)
    return {
        **{key: round(value, 3) for key, value in middle.items()},
        "mlx_peak_gb": round(statistics.median(mlx), 3) if mlx else None,
        "share_of_peak": round(work / middle["seconds"] / 1e9 / peak, 3),
        "all_seconds": [r["seconds"] for r in runs],
        "first_loss": runs[0]["first_loss"],
        "last_loss": runs[0]["last_loss"],
    }


HEADER = ("", "seconds", "MLX peak GB", "max RSS GB", "of peak")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of numbers as text, in the columns of HEADER."""
    mlx = "-" if row["mlx_peak_gb"] is None else f"{row['mlx_peak_gb']:.2f}"
    share = f"{row['share_of_peak']:.0%}"
    return row["contestant"], f"{row['seconds']:.2f}", mlx, f"{row['maxrss_gb']:.2f}", share


def ratios(row: dict[str, Any], base: dict[str, Any]) -> tuple[str, str]:
    """Time and resident memory over those of another row."""
    return f"{row['seconds'] / base['seconds']:.2f}", f"{row['maxrss_gb'] / base['maxrss_gb']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--case", default="dpo-cached", help="comma-separated: " + ", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("flags", nargs="*", help="after --: more flags of mlx-realign train")
    a = parser.parse_args()
    names = a.case.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    peaks: list[float] = []
    runs: dict[str, list[dict]] = {name: [] for name in names}
    flops = {name: workload.flops_per_step(a.model, CASES[name], a.data) for name in names}
    steps = {name: epoch_steps(case, a.data) if (case := CASES[name]).goal == "epoch" else a.steps for name in names}
    for _ in range(a.rounds):
        peaks.append(launch.matmul_peak_gflops(Path(sys.executable)))
        for name in names:
            done = train(CASES[name], a.model, a.data, steps=steps[name], flags=a.flags)
            runs[name].append(summary(name, CASES[name], done, flops[name], peaks[-1]))
            print(f"{name}: {runs[name][-1]['seconds']} s", file=sys.stderr, flush=True)
    peak = statistics.median(peaks)
    found = {name: medians(runs[name], flops[name], peak, steps[name], CASES[name]) for name in names}
    first = found[names[0]]
    for row in found.values():
        row["time_ratio"] = round(row["seconds"] / first["seconds"], 3)
    lines = [(*HEADER, "time : first", "RSS : first")]
    lines += [(*cells({"contestant": name, **row}), *ratios(row, first)) for name, row in found.items()]
    print("\n".join(f"{name}: {CASES[name].about}" for name in names))
    lengths = workload.lengths(a.data)
    print(f"prompts of {lengths['prompt']} tokens; matmul peak {peak:.0f} GFLOP/s\n{launch.table(lines)}")
    head = {"machine": launch.machine(), "model": a.model.name, "lengths": lengths, "rounds": a.rounds}
    print(json.dumps({**head, "matmul_peak_gflops": [round(p, 1) for p in peaks], "cases": found, "runs": runs}))


if __name__ == "__main__":
    main()
