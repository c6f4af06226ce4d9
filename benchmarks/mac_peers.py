# SPDX-License-Identifier: Apache-2.0
"""Part `peers` of `mac.py`: the runs that others have published of Macs, by us and by them, in turn on this one.

Ours, then each peer, as many rounds as are asked for, with a pause between runs; each with the same model, rows,
rank and number of steps. Speeds of sft and orpo count the tokens of the rows, once for every contestant; those of grpo
the tokens it generated. A step is the median after the first two.
"""

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch
import peers
import workload
from mac_checks import found
from mac_facts import MAC, memory_gb
from mac_job import EMBEDDED, QWEN3, QWEN3_8B, QWEN35, Job, Model, say

OURS = "mlx-realign"
GROUP = 4
RUN_LIMIT_S = 2400.0
MLX = "mlx==0.32.4" if MAC else "mlx[cpu]==0.32.4"
# peer -> one pip command after the other; versions as in the drivers
INSTALLED = {
    "mlx-lm": [[MLX, "mlx-lm==0.32.2"]],
    "mlx-lm-lora": [[MLX, "mlx-lm-lora==5.10.2"]],
    "unsloth": [
        [MLX, "mlx-lm==0.32.2", "transformers<=5.17.0", "datasets>=4.1.1,<4.4", "psutil", "msgspec", "pillow"],
        ["--no-deps", "unsloth_zoo==2026.10.9"],
    ],
}


@dataclass(frozen=True)
class Row:
    """A run, and what was published of it."""

    key: str
    method: str
    model: Model
    tokens: int  # of a row; grpo: the most of a completion
    published: str
    needs_gb: float = 8.0  # memory of the machine
    large: bool = False  # only with --large


ROWS = (
    Row("sft-qwen3-0.6b", "sft", QWEN3, 512, "about 4.7 it/s, 2-4 GB, M4 Pro 24 GB (mlx-lm-lora; length not said)"),
    Row("orpo-qwen3-0.6b", "orpo", QWEN3, 512, "4.5 it/s, 2-4 GB, M4 Pro 24 GB (mlx-lm-lora; length not said)"),
    Row("grpo-qwen3-0.6b", "grpo", QWEN3, 256, "M4 Max: .412 it/s, 558 tok/s, 5.32 GB (mlx-lm-lora); .283, 454, 6.25 "
        "(inductive-mlxrl); .130 (mlx-tune)"),
    Row("sft-qwen3.5-0.8b", "sft", QWEN35, 2048, "900-1,100 tok/s, 4.2 GB (unsloth; machine not said)", 16),
    Row("sft-qwen3-8b-2048", "sft", QWEN3_8B, 2048, "97.8 tok/s, M1 Max 32 GB (mlx-train-perf)", 24, True),
    Row("sft-qwen3-8b-8192", "sft", QWEN3_8B, 8192, "78.1 tok/s, 25.7 GiB; light attention 74.0 tok/s, 12.75 GiB, "
        "M1 Max 32 GB (mlx-train-perf)", 32, True),
)  # fmt: skip
SMALL_ROWS = (
    Row("sft-small", "sft", EMBEDDED, 128, "nothing: a trial of this program", 0),
    Row("grpo-small", "grpo", EMBEDDED, 24, "nothing: a trial of this program", 0),
)
NOT_HERE = {
    "sft-packed-alpaca": "packing is not there yet; published: 99.2 tok/s against 33.1 unpacked, M1 Max",
    "heretic-qwen2.5-0.5b": "it needs PyTorch and its data sets: benchmarks/ablation.py; published: 18 min, M4 Max",
}


def compare(job: Job) -> None:
    """Every row of the table."""
    small = not job.size.downloads
    venvs = {"mlx-lm": job.python.parent.parent} if small else installed(job)
    for row in SMALL_ROWS if small else ROWS:
        reason = refused(job, row)
        if reason:
            job.leave_out({"row": row.key}, f"{reason}; published: {row.published}", published=row.published)
            continue
        one_row(job, row, {key: venv for key, venv in venvs.items() if fit(row, key)})
    for key, reason in ({} if small else NOT_HERE).items():
        job.leave_out({"row": key}, reason)


def refused(job: Job, row: Row) -> str | None:
    """Why a row is not run on this machine."""
    if row.large and not job.large:
        return f"--large runs it (downloads {row.model.download_gb:g} GB, takes about an hour)"
    size = memory_gb()
    if size is not None and size < row.needs_gb * 0.95:  # a machine reports a little less than it is sold with
        return f"it wants {row.needs_gb:g} GB of memory, this machine has {size:.0f}"
    return None


def fit(row: Row, key: str) -> bool:
    """Whether a peer trains by the row's method; benchmarks/grpo.py has the list of those that do grpo."""
    return row.method in peers.PEERS[key].methods or row.method == "grpo" and key != "mlx-lm"


def installed(job: Job) -> dict[str, Path]:
    """A virtual environment of each peer; one that does not install is a line of the result."""
    made = {}
    for key, commands in INSTALLED.items():
        venv = job.work / f"peer-{key}"
        if (venv / "installed").exists():
            made[key] = venv
            continue
        try:
            launch.run([sys.executable, "-m", "venv", "--clear", venv])
        except launch.Failed as error:
            job.note({"peer": key}, "failed", str(error).splitlines()[-1])
            continue
        pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = [
            job.measure({"peer": key, "packages": " ".join(words)}, [*pip, *words],
                        lambda *_: {"python": platform.python_version()}, again=True)
            for words in commands
        ]  # fmt: skip
        if all(done):
            (venv / "installed").touch()
            made[key] = venv
    return made


def one_row(job: Job, row: Row, venvs: dict[str, Path]) -> None:
    """A B C A B C, then medians."""
    names = [OURS, *(peers.PEERS[key].name for key in venvs)]
    cases = [{"row": row.key, "who": who, "round": n + 1} for n in range(job.size.rounds) for who in names]
    tokens = ("--tokens", row.tokens, "--rows", 8)
    folders = found(job, row.model, cases, tokens)
    drivers = {peers.PEERS[key].name: (key, venv) for key, venv in venvs.items()}
    for case in cases if folders else ():
        assert folders
        if (job.entry(case) or {}).get("status") == "done":
            continue
        broken = job.entry({**case, "round": 1}) if case["round"] > 1 else None
        if broken and broken["status"] == "failed":
            job.leave_out(case, "it failed in the first round")
            continue
        time.sleep(job.size.cool_s)
        if case["who"] == OURS:
            flags = ours(row, *folders, job.size.steps)
            job.train(case, flags, lambda rows, rss: own_numbers(row, rows, rss, folders[1]), limit=RUN_LIMIT_S)
        else:
            key, venv = drivers[case["who"]]
            command = [venv / "bin/python", peers.DRIVERS / peers.PEERS[key].driver]
            command += theirs(row, *folders, job.size.steps)
            own = {"TMPDIR": str(job.scratch)}  # they leave their adapters there
            own |= {} if MAC else {"BENCHMARK_BLAS": launch.fast_blas(job.python)}
            job.measure(case, command, lambda text, rss: their_numbers(row, launch.last_json(text), rss, folders[1]),
                        environment=own, limit=RUN_LIMIT_S)  # fmt: skip
    for who in names:
        middle(job, row, who)


def file_of(row: Row, texts: Path) -> Path:
    """Its rows."""
    kind = {"sft": "sft", "grpo": "prompts"}.get(row.method, "dpo")
    return texts / f"{kind}-{row.tokens}.jsonl"


def ours(row: Row, model: Path, texts: Path, steps: int) -> list[Any]:
    """Flags of `mlx-realign train`."""
    flags = ["--method", row.method, "--model", model, "--data", file_of(row, texts), "--steps", steps]
    flags += ["--batch-size", 1, "--lora-rank", workload.RANK, "--lora-alpha", workload.ALPHA]
    flags += ["--learning-rate", workload.LEARNING_RATE, "--max-length", 2 * row.tokens + 64]
    if row.method == "grpo":
        flags += ["--verifier", f"{peers.DRIVERS / 'reward.py'}:verify", "--group-size", GROUP, "--temperature", 1.0]
        flags += ["--max-new-tokens", row.tokens, "--loss-type", "grpo"]
    return flags


def theirs(row: Row, model: Path, texts: Path, steps: int) -> list[Any]:
    """Flags of a peer's driver."""
    flags = ["--method", row.method, "--model", model, "--data", file_of(row, texts), "--steps", steps, "--batch", 1]
    flags += ["--rank", workload.RANK, "--alpha", workload.ALPHA, "--learning-rate", workload.LEARNING_RATE]
    flags += ["--max-length", 2 * row.tokens + 64, "--dtype", "auto"]
    flags += ["--group-size", GROUP, "--max-new-tokens", row.tokens] if row.method == "grpo" else []
    return flags


def own_numbers(row: Row, rows: list[dict[str, Any]], maxrss: float, texts: Path) -> dict[str, Any]:
    """Of a run of ours."""
    made = [round(one.get("completions/mean_length", 0) * GROUP) for one in rows]
    peak = max(one["peak_memory_gb"] for one in rows)
    return numbers(row, [one["step_s"] for one in rows], made, peak, maxrss, texts)


def their_numbers(row: Row, told: dict[str, Any], maxrss: float, texts: Path) -> dict[str, Any]:
    """Of a run of a peer; ValueError where it made no step."""
    if not told["steps_s"]:
        raise ValueError("it made no step")
    return numbers(row, told["steps_s"], told["notes"].get("tokens", []), told["mlx_peak_gb"], maxrss, texts)


def numbers(
    row: Row, steps_s: list[float], generated: list[int], peak: float | None, maxrss: float, texts: Path
) -> dict[str, Any]:
    """The same for every contestant."""
    step = statistics.median(steps_s[workload.WARM_UP_STEPS :] or steps_s)
    speed = row_tokens(row, texts) / step
    if row.method == "grpo":
        kept = list(zip(generated, steps_s, strict=False))[workload.WARM_UP_STEPS :]
        speed = sum(n for n, _ in kept) / sum(s for _, s in kept) if kept else None
    return {
        "tokens_per_second": None if speed is None else round(speed, 1),
        "iterations_per_second": round(1 / step, 4),
        "peak_memory_gb": None if peak is None else round(peak, 3),
        "resident_gb_largest": round(maxrss, 3),
        "steps_s": [round(s, 4) for s in steps_s],
    }


def row_tokens(row: Row, texts: Path) -> int:
    """Prompt and completions of a row, the prompt once."""
    lengths = json.loads((texts / "lengths.json").read_text(encoding="utf-8"))[str(row.tokens)]
    kind = lengths["sft" if row.method == "sft" else "dpo"]
    return kind["prompt"] + kind["chosen"] + (kind["rejected"] if row.method == "orpo" else 0)


def middle(job: Job, row: Row, who: str) -> None:
    """Medians over the rounds of a contestant."""
    own = {"row": row.key, "who": who}
    runs = [e for e in job.entries if e["of"].items() >= own.items() and "round" in e["of"]]
    good = [e["found"] for e in runs if e["status"] == "done"]
    of = {"row": row.key, "who": who, "median": True}
    if not good:
        job.leave_out(of, "no round of it succeeded", published=row.published)
        return
    keys = [key for key in good[0] if key != "steps_s"]
    told: dict[str, Any] = {"rounds": len(good)}
    for key in keys:
        values = [one[key] for one in good if one[key] is not None]
        told[key] = round(statistics.median(values), 4) if values else None
    job.note(of, "done", None, command="medians of the rounds above", found=told, published=row.published)
    say(f"  {row.key}, {who}: {told['tokens_per_second']} tokens/s")
