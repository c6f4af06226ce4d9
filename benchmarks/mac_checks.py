# SPDX-License-Identifier: Apache-2.0
"""Parts `checks`, `traces` and `limits` of `mac.py`: a model's own checks, shapes of real lengths, small Macs."""

import statistics
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import launch
from mac_job import Job, Missing, Model, say

MIXED_ROWS, BATCH = 400, 4  # rows of traces: 100 steps of 4
MIXED = ("--mixed", "short", "--rows", MIXED_ROWS)
CHECKED = ("--tokens", 256, "--rows", 8)
LIMITS_GB = {"8 GB": 5.5, "16 GB": 11.0}  # what macOS lets a GPU use of them by default, about two thirds
SETTLED = 10  # steps


def checks(job: Job) -> None:
    """Self-check, notes, shares and estimates of each model, with and without checkpointing."""
    for wanted in job.size.checked:
        cases = [{"model": wanted.short, "method": "dpo", "grad-checkpoint": on} for on in (False, True)]
        folder = found(job, wanted, cases)
        if not folder:
            continue
        for case in cases:
            flags = ["--method", "dpo", "--model", folder[0], "--data", folder[1] / "dpo-256.jsonl"]
            job.dry_run(case, [*flags, "--batch-size", 2, *["--grad-checkpoint"] * case["grad-checkpoint"]])


def found(
    job: Job, wanted: Model, cases: list[dict[str, Any]], flags: tuple[Any, ...] = CHECKED
) -> tuple[Path, Path] | None:
    """Folders of a model and of rows for it; None: noted with each case why there are none."""
    if all((job.entry(case) or {}).get("status") == "done" for case in cases):
        return None
    try:
        folder = job.model(wanted)
        return folder, job.texts(folder, *flags)
    except (Missing, launch.Failed) as error:
        reason = str(error).splitlines()[-1]
        say(f"  {wanted.short}: {reason}")
        for case in cases:
            job.note(case, "failed", reason)
        return None


def traces(job: Job) -> None:
    """Shapes of the committed lengths: planned, and as they lay; resident memory while traces pile up or do not."""
    methods = {"sft": "mixed-sft.jsonl", "dpo": "mixed.jsonl"}
    dry = [{"plan for": "metal", "method": method, "model": job.size.model.short} for method in methods]
    real = [{"steps": job.size.traced_steps, "method": m, "model": job.size.model.short} for m in methods]
    folders = found(job, job.size.model, [*dry, *real], MIXED)
    if not folders:
        return
    for (method, file), planned, made in zip(methods.items(), dry, real, strict=True):
        common = ["--method", method, "--model", folders[0], "--data", folders[1] / file, "--batch-size", BATCH]
        common += ["--max-length", 2048]
        job.dry_run(planned, [*common, "--plan-for", "metal"])
        resident: list[tuple[int, float]] = []
        steps = job.size.traced_steps

        def watch(pid: int, metrics: Path, resident: list[tuple[int, float]] = resident) -> None:
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                size = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout
                done = metrics.read_text(encoding="utf-8").count('"step_s"') if metrics.exists() else 0
                resident.append((done, int(size) * 1024 / 1e9))

        def read(rows: list[dict[str, Any]], maxrss: float, resident: list[tuple[int, float]] = resident) -> dict:
            later = [size for done, size in resident if done >= SETTLED]
            kept = ("shapes", "compiled_share", "padding_share", "recomputed_share", "mask_free_share", "banded_share")
            return {
                **{key: rows[-1].get(key) for key in kept},
                **speed(rows),
                "resident_gb_settled": later[0] if later else None,  # null: the run was over too soon to be looked at
                "resident_gb_last": later[-1] if later else None,
                "resident_gb_largest": round(maxrss, 3),
            }

        job.train(made, [*common, "--steps", steps], read, watch=watch)


def limits(job: Job) -> None:
    """The same run within what small Macs give."""
    size = job.size
    tokens, cases = size.limits_tokens, []
    for name, limit in LIMITS_GB.items():
        for on in (False, True):
            cases.append({"machine": name, "memory-limit": limit, "method": "sft", "tokens": tokens,
                          "grad-checkpoint": on, "model": size.model.short})  # fmt: skip
    folders = found(job, size.model, cases, ("--tokens", tokens))
    for case in cases if folders else ():
        assert folders
        limit = case["memory-limit"]
        flags = ["--method", "sft", "--model", folders[0], "--data", folders[1] / f"sft-{tokens}.jsonl"]
        flags += ["--steps", size.steps, "--batch-size", 1, "--max-length", tokens + 64, "--memory-limit", limit]
        flags += ["--grad-checkpoint"] * case["grad-checkpoint"]
        job.train(case, flags, lambda rows, rss, limit=limit: fits(rows, rss, limit))


def fits(rows: list[dict[str, Any]], maxrss: float, limit: float) -> dict[str, Any]:
    """Whether a run stayed within a limit, and how fast it was."""
    peak = max(row["peak_memory_gb"] for row in rows)
    return {"fits": peak <= limit, **speed(rows), "resident_gb_largest": round(maxrss, 3)}


def speed(rows: list[dict[str, Any]], warm_up: int = launch.WARM_UP_STEPS) -> dict[str, Any]:
    """Medians of steps after the warm-up, and the largest peak of MLX's memory of them all."""
    timed = rows[warm_up:] or rows
    return {
        "steps": len(rows),
        "step_s": round(statistics.median(row["step_s"] for row in timed), 4),
        "tokens_per_second": round(statistics.median(row["tokens_per_second"] for row in timed), 1),
        "peak_memory_gb": round(max(row["peak_memory_gb"] for row in rows), 3),
        "last_loss": rows[-1]["loss"],
    }
