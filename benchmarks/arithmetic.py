# SPDX-License-Identifier: Apache-2.0
"""Teach SmolLM2-135M-Instruct sums of two numbers by reinforcement learning, and measure it on held-out sums.

    python benchmarks/arithmetic.py [--model FOLDER] [--work FOLDER] [--report FOLDER] [-- FLAGS OF mlx-realign train]
    python benchmarks/arithmetic.py --pages            (only writes the page again from the report folder)

No answer is shown to the model: it tries each sum of the training part twelve times, and a verifier says which tries
are right. The recipe is `arithmetic.toml`. The report goes to docs/arithmetic, and docs/arithmetic.md beside it.
--work keeps the problems and the adapter; where it has one, that is measured and none trained. Without
--model, `smollm2.py` builds the folder of the model. --shared: the page says that the machine had other work beside.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import launch
import numpy as np
import one_sentence
import smollm2
from arithmetic_page import write_pages
from one_sentence import read_rows, write_rows

from mlx_realign.data.make import MakeSettings, make
from mlx_realign.intervals import paired, pass_at_k, sign_test
from mlx_realign.policy import Policy
from mlx_realign.workers import cores

REPORT = Path(__file__).parent.parent / "docs/arithmetic"
RECIPE = Path(__file__).with_suffix(".toml")
SIDES = {"test": 100, "valid": 40, "train": 240}  # problems
DRAWN = 420  # sums drawn for them: a + b and b + a are one problem
SAMPLES = 4  # sampled completions of a held-out problem
ORDINARY = 10  # questions that have nothing to do with sums
EXAMPLE = (  # before every problem; a sum that no side has
    {"role": "system", "content": "You add numbers."},
    {"role": "user", "content": "38 + 27"},
    {"role": "assistant", "content": "38 + 27 = 65"},
)
LARGER = "min=100,max=999,operators=+", 50  # longer sums than it trains on, and how many of them
MODES = ("greedy", "sampled")
MEASURES = ("pass@1", f"pass@{SAMPLES}", "unparsed", "cut", "tokens")

Row = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------- problems


def sums(config: str, count: int, seed: int) -> list[Row]:
    """Problems of `mlx-realign data make --task sums`, each asked behind an example that shows the form."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "sums.jsonl"
        made = MakeSettings("sums", str(file), rows=count, seed=seed, config=tuple(config.split(",")), ask="none")
        make(made)
        rows = read_rows(file)
    asked = [(row["prompt"].removeprefix("What is ").removesuffix("?"), row["answer"]) for row in rows]
    return [{"prompt": [*EXAMPLE, {"role": "user", "content": sum_}], "answer": answer} for sum_, answer in asked]


def numbers(row: Row) -> tuple[int, int]:
    """The two numbers of a problem."""
    first, _, second = row["prompt"][-1]["content"].split()
    return int(first), int(second)


def problems() -> dict[str, list[Row]]:
    """Rows by side. Which two numbers are added, in whatever order, stands on one side only, and there once."""
    different: dict[tuple[int, ...], Row] = {}
    for row in sums("min=10,max=99,operators=+", DRAWN, seed=0):
        different.setdefault(tuple(sorted(numbers(row))), row)
    different.pop((27, 38), None)  # shown
    rows = iter(different.values())
    return {side: [next(rows) for _ in range(count)] for side, count in SIDES.items()}


def carries(row: Row) -> bool:
    """Whether the ones digits of a sum make ten or more."""
    return sum(number % 10 for number in numbers(row)) >= 10


# ------------------------------------------------------------------------------------------------------------- measures


def evaluate(model: Path, file: Path, samples: int, adapter: Path | None = None) -> tuple[Row, list[Row]]:
    """What `mlx-realign evaluate` finds, and its answers by problem; those of the start model are kept beside."""
    recipe, when = tomllib.loads(RECIPE.read_text()), "after" if adapter else "before"
    answers, kept = (file.with_name(f"{file.stem}-{when}.{suffix}") for suffix in ("jsonl", "json"))
    if adapter or not kept.exists():
        answers.unlink(missing_ok=True)  # of an earlier run in this folder
        words = ["--model", model, "--data", file, "--verifier", recipe["verifier"], "--samples", samples]
        words += ["--max-new-tokens", recipe["max_new_tokens"], "--output", answers, "--json"]
        words += ["--adapter", adapter] if adapter else []
        command = [sys.executable, "-m", "mlx_realign.evaluate", *map(str, words)]
        kept.write_text(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = json.loads(kept.read_text())
    named = lambda rates: {name: rates[name] for name in MEASURES if name in rates}  # noqa: E731
    rates = {mode: named(found[mode]) for mode in MODES if mode in found}
    return rates, by_problem(read_rows(file), read_rows(answers))


def by_problem(rows: list[Row], answers: Iterable[Row]) -> list[Row]:
    """prompt, answer, and of each mode the completions and whether they are right."""
    found = [{**row, **{mode: {"texts": [], "right": []} for mode in MODES}} for row in rows]
    for one in answers:
        side = found[one["line"] - 1][one["mode"]]
        side["texts"].append(one["completion"])
        side["right"].append(one["right"])
    return found


def difference(before: list[Row], after: list[Row]) -> Row:
    """after - before on the same problems, by mode and measure, as `mlx-realign evaluate --before` has it."""
    found: Row = {}
    for mode in MODES:
        sides = [np.array([row[mode]["right"] for row in rows], float) for rows in (before, after)]
        tries = sides[0].shape[1]
        for k in sorted({1, tries}) if tries else ():
            old, new = (np.array([pass_at_k(tries, int(one.sum()), k) for one in side]) for side in sides)
            higher, lower = int((new > old).sum()), int((new < old).sum())
            moved = paired(old, new, np.full(len(old), tries // k))._asdict()
            told = moved | {"higher": higher, "lower": lower, "p": sign_test(higher, lower)}
            found.setdefault(mode, {})[f"pass@{k}"] = told
    return found


def compared(model: Path, file: Path, samples: int, adapter: Path) -> tuple[Row, list[Row]]:
    """{before, after, difference} of a file of problems, and its problems with the answers of both sides."""
    (before, old), (after, new) = evaluate(model, file, samples), evaluate(model, file, samples, adapter)
    answered = lambda row: {mode: row[mode] for mode in MODES}  # noqa: E731
    both = [
        {"prompt": a["prompt"], "answer": a["answer"], "before": answered(a), "after": answered(b)}
        for a, b in zip(old, new, strict=True)
    ]
    return {"problems": len(both), "before": before, "after": after, "difference": difference(old, new)}, both


def by_carry(replies: list[Row]) -> dict[str, dict[str, int]]:
    """Greedy answers right before and after, of the sums that carry and of those that do not."""
    found = {}
    for name, wanted in (("with", True), ("without", False)):
        some = [row for row in replies if carries(row) is wanted]
        found[name] = {"problems": len(some)} | {
            when: sum(row[when]["greedy"]["right"][0] for row in some) for when in ("before", "after")
        }
    return found


def ordinary(model: Path, adapter: Path) -> Row:
    """Greedy replies to questions that are not sums, before and after: words, degenerate ones, KL to the start."""
    asked = one_sentence.prompts()[0][:ORDINARY]
    policy = Policy.load(str(model), adapter=str(adapter))
    with policy.adapter_off():
        before = one_sentence.answer(policy, asked)
    after = one_sentence.answer(policy, asked)
    kl = one_sentence.against_start(policy, asked, after)
    names = ("words", "degenerate")
    measures = [one_sentence.measure(replies) for replies in (before, after)]
    return {
        "prompts": len(asked),
        "before": {name: measures[0][name] for name in names},
        "after": {name: measures[1][name] for name in names},
        "same": sum(old == new for old, new in zip(before, after, strict=True)),
        "kl": kl["kl"],
        "tokens": kl["tokens"],
    }


def curve(metrics: list[Row], width: int = 10) -> list[Row]:
    """Means over each `width` steps: reward, zero_std, entropy; eval_reward and kl as measured at the last of them."""
    steps = {row["step"]: row for row in metrics if "loss" in row}
    judged = {row["step"]: row["eval_reward"] for row in metrics if "eval_reward" in row}
    found = []
    for first in range(1, len(steps) + 1, width):
        some = [steps[step] for step in range(first, min(first + width, len(steps) + 1))]
        names = {"reward": "reward", "zero_std": "frac_reward_zero_std", "entropy": "entropy"}
        means = {short: sum(row[name] for row in some) / len(some) for short, name in names.items()}
        last = some[-1]["step"]
        found.append({"first": first, "last": last, **means, "eval_reward": judged.get(last), "kl": some[-1].get("kl")})
    return found


# ------------------------------------------------------------------------------------------------------------------ run


def train(model: Path, work: Path, flags: list[str]) -> None:
    """Trains by the recipe through the command line."""
    paths = ["--model", str(model), "--data", str(work / "sums"), "--output", str(work / "adapter")]
    command = [sys.executable, "-m", "mlx_realign.train", "--config", str(RECIPE), *paths, *flags]
    subprocess.run(command, check=True)


def run(model: Path, work: Path, report: Path, flags: list[str], shared: bool) -> None:
    """Problems, training, measures; all of it into the report folder."""
    (work / "sums").mkdir(parents=True, exist_ok=True)
    for side, rows in problems().items():
        write_rows(work / "sums" / f"{side}.jsonl", rows)
    write_rows(work / "larger.jsonl", sums(*LARGER, seed=1))
    if (work / "adapter/adapters.safetensors").exists() and flags:
        raise SystemExit(f"{work} holds an adapter already: no flags for training, or another folder")
    if not (work / "adapter/adapters.safetensors").exists():
        train(model, work, flags)
    metrics = read_rows(work / "adapter/metrics.jsonl")
    steps = [row for row in metrics if "loss" in row]

    held_out, replies = compared(model, work / "sums/test.jsonl", SAMPLES, work / "adapter")
    result = {
        "model": model.name,
        "problems": SIDES,
        "recipe": tomllib.loads(RECIPE.read_text()),
        "train": {
            "flags": " ".join(flags),
            "shared": shared,
            "cores": cores(),
            "steps": len(steps),
            "seconds": sum(row["step_s"] for row in steps),
            "rollout_seconds": sum(row["rollout_s"] for row in steps),
            "peak_memory_gb": max(row["peak_memory_gb"] for row in steps),
        },
        "curve": curve(metrics),
        "held_out": held_out,
        "carry": by_carry(replies),
        "larger": compared(model, work / "larger.jsonl", 0, work / "adapter")[0],
        "ordinary": ordinary(model, work / "adapter"),
        "machine": launch.machine(),
        "versions": {name: metadata.version(name) for name in ("mlx-realign", "mlx", "mlx-lm")},
    }
    report.mkdir(parents=True, exist_ok=True)
    write_rows(report / "metrics.jsonl", metrics)
    write_rows(report / "replies.jsonl", replies)
    (report / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"greedy": held_out["difference"]["greedy"]["pass@1"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("flags", nargs="*", help="after --: more flags of mlx-realign train")
    a = parser.parse_args()
    if not a.pages:
        with tempfile.TemporaryDirectory() as scratch:
            run(a.model or smollm2.ensure(), a.work or Path(scratch), a.report, a.flags, a.shared)
    write_pages(a.report)


if __name__ == "__main__":
    main()
