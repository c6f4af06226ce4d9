# SPDX-License-Identifier: Apache-2.0
"""Parts `memory` and `steady` of `mac.py`: peaks by row length beside what was planned, and ten minutes of one run."""

from typing import Any

from mac_checks import found, speed
from mac_job import ROOT, Job, told

METHODS = ("sft", "dpo")
ENOUGH = 1_000_000  # steps: more than any machine does before it is told to stop
PEAKS = ("estimated_peak_memory_gb", "peak_memory_gb", "peak_gb")  # how a plan may call it


def memory(job: Job) -> None:
    """A step at each length: measured peak, the dry run's, the plan's; then how far the plan is off."""
    size, name = job.size, job.size.model.short
    wanted = [{"method": m, "tokens": n, "model": name} for m in METHODS for n in size.lengths]
    cases = [case | {"by": by} for case in wanted for by in ("step", "dry run", "plan")]
    folders = found(job, size.model, cases, ("--tokens", ",".join(map(str, size.lengths)), "--rows", 4))
    for case in wanted if folders else ():
        assert folders
        tokens, method = case["tokens"], case["method"]
        flags = ["--method", method, "--model", folders[0], "--data", folders[1] / f"{method}-{tokens}.jsonl"]
        flags += ["--batch-size", 1, "--max-length", tokens + 64]
        job.train(case | {"by": "step"}, [*flags, "--steps", 4], lambda rows, _: speed(rows))
        job.dry_run(case | {"by": "dry run"}, flags)
        planned(job, case | {"by": "plan"}, flags)
    for method in METHODS:
        fitted(job, method)


def planned(job: Job, case: dict[str, Any], flags: list[Any]) -> None:
    """What `mlx-realign plan` says, where there is that command."""
    if not (ROOT / "mlx_realign/plan.py").exists():
        job.leave_out(case, "this version has no `mlx-realign plan`")
        return
    command = [job.python, "-m", "mlx_realign.plan", *flags, "--json"]
    job.measure(case, command, lambda text, _: told(text))


def peak_in(found: dict[str, Any] | None) -> float | None:
    """The peak that a plan tells, wherever in it."""
    if not isinstance(found, dict):
        return None
    own = next((found[key] for key in PEAKS if isinstance(found.get(key), int | float)), None)
    return own if own is not None else next(filter(None, map(peak_in, found.values())), None)


def fitted(job: Job, method: str) -> None:
    """Measured peaks as a line over the tokens of a row, and the factors by which plan and dry run are off."""
    points: list[tuple[int, float]] = []
    pairs: dict[str, list[tuple[float, float]]] = {"plan": [], "dry run": []}
    for entry in job.entries:
        of = entry["of"]
        if of.get("by") == "step" and of["method"] == method and entry["found"]:
            points.append((of["tokens"], entry["found"]["peak_memory_gb"]))
            for by, known in pairs.items():
                guess = peak_in((job.entry(of | {"by": by}) or {}).get("found"))
                if guess is not None:
                    known.append((guess, points[-1][1]))
    of = {"method": method, "fit": True}
    if len(points) < 2:
        job.leave_out(of, "fewer than two lengths were measured")
        return
    slope, start = line(points)
    told: dict[str, Any] = {"lengths": len(points), "gb_per_1000_tokens": slope * 1000, "gb_without_rows": start}
    told["growth_of_the_last_doubling"] = points[-1][1] / points[-2][1]  # 4 where memory is quadratic
    for by, known in pairs.items():
        told[f"measured_over_{by.replace(' ', '_')}"] = factor(known)
    job.note(of, "done", None, command="least squares over the peaks of `step` above", found=told)


def line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Slope and value at 0 of the line of least squares."""
    n, x, y = len(points), sum(p[0] for p in points), sum(p[1] for p in points)
    slope = (n * sum(a * b for a, b in points) - x * y) / (n * sum(a * a for a, _ in points) - x * x)
    return slope, (y - slope * x) / n


def factor(known: list[tuple[float, float]]) -> float | None:
    """k of measured = k * guess, by least squares; None without a guess."""
    return sum(a * b for a, b in known) / sum(a * a for a, _ in known) if known else None


def steady(job: Job) -> None:
    """One run until its time is over: tokens per second of each minute, and of the last against the first."""
    size = job.size
    tokens = size.limits_tokens
    case = {"minutes": size.steady_s / 60, "method": "sft", "tokens": tokens, "model": size.model.short}
    folders = found(job, size.model, [case], ("--tokens", tokens))
    if not folders:
        return
    flags = ["--method", "sft", "--model", folders[0], "--data", folders[1] / f"sft-{tokens}.jsonl"]
    flags += ["--batch-size", 1, "--max-length", tokens + 64, "--steps", ENOUGH]
    span = 60.0 if size.steady_s >= 180 else size.steady_s / 5
    job.train(case, flags, lambda rows, _: by_span(rows, span), limit=size.steady_s, ended=True)


def by_span(rows: list[dict[str, Any]], span_s: float) -> dict[str, Any]:
    """Tokens per second of each `span_s` of training, the first step and a last, broken span left out."""
    tokens, seconds, speeds, before = 0, 0.0, [], rows[0]["num_tokens"]
    for row in rows[1:]:
        tokens, seconds, before = tokens + row["num_tokens"] - before, seconds + row["step_s"], row["num_tokens"]
        if seconds >= span_s:
            speeds.append(round(tokens / seconds, 1))
            tokens, seconds = 0, 0.0
    ratio = speeds[-1] / speeds[0] if len(speeds) > 1 else None
    return {"steps": len(rows), "span_s": span_s, "tokens_per_second": speeds, "last_over_first": ratio}
