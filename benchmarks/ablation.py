# SPDX-License-Identifier: Apache-2.0
"""Time a search for ablation kernels against Heretic's, run as a program: same model, prompts, ranges and cores.

    python3 -m venv VENV && VENV/bin/pip install heretic-llm==1.4.0       (with a CPU wheel of torch)
    python benchmarks/ablation.py --model SmolLM2-135M-Instruct --heretic VENV [--trials 20] [--seeds 0,1,2]

What goes is SmolLM2's apology for errands (benchmarks/apologies, by make_contrast.py): 100 + 100 prompts for the
direction, 50 + 50 to judge by, 100 new tokens, markers "sorry" and "apolog", KL of the first token, float32. Heretic
gets batches of 64, so that all rows of a trial are one batch, and its defaults otherwise; it ends by itself when it
finds nobody to choose. Two numbers:

per token   seconds of a trial, KL included, over the tokens of its completions. Ours computes the kernels that Heretic
            drew (exact projections, not rows kept in norm) with every completion whole: nothing stops or is pruned.
to a front  seconds until our search has a front as good as Heretic's last one: for each of its trials there is one of
            ours with a KL no higher (below 0.01 nats all are equal) and a rate that is not worse beyond the 95%
            interval of the difference. Heretic's clock starts with its first trial, ours with the call, so that the
            unedited model is included. Our search ends there, or after three times as many trials.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import launch

from mlx_realign import capture, directions, writers
from mlx_realign.ablation import search
from mlx_realign.ablation.kernel import Kernel, Tent
from mlx_realign.ablation.pareto import dominates, hypervolume
from mlx_realign.ablation.scorers import Divergence, Markers, Setting
from mlx_realign.ablation.trial import Job, Runner, Slots
from mlx_realign.intervals import square_and_add, wilson
from mlx_realign.policy import Policy
from mlx_realign.vectors import Direction

FOLDER = Path(__file__).parent / "apologies"
MARKERS = ("sorry", "apolog")
SYSTEM = "You are a helpful assistant."  # Heretic puts it before every prompt
TOKENS, FINEST = 100, 0.01
TOGETHER = 8  # trials whose rows are decoded together where time per token is taken: as many as a search has under way


class Point(NamedTuple):
    """A trial that was judged whole."""

    at_s: float  # when it was done, since the search began
    seconds: float  # what it took by itself; Heretic's only
    kl: float
    rate: float
    kernel: Kernel | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--heretic", type=Path, required=True, help="virtual environment")
    parser.add_argument("--trials", type=int, default=20, help="of each search")
    parser.add_argument("--seeds", default="0,1,2", help="of our searches; Heretic's is the first")
    parser.add_argument("--prompts", type=int, default=50, help="of each side, to judge by")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    a = parser.parse_args()
    seeds = [int(seed) for seed in a.seeds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_prompts(folder, a.prompts)
        theirs, said = run_heretic(a, folder, files, seeds[0])
        policy = Policy.load(a.model, dtype="float32")
        positive, negative = (
            [asked(line) for line in files[f"{side}-eval"].read_text().splitlines()] for side in SIDES
        )
        direction, found = extract(policy, files), writers.find(policy)
        setting = Setting(policy, positive, negative, markers=MARKERS, max_new_tokens=a.tokens, loops=0.0)
        ours = per_token(setting, direction, found, [point.kernel for point in theirs if point.kernel][:TOGETHER])
        searches = []
        for seed in seeds:
            journal, startup = folder / f"{seed}.jsonl", int(0.3 * a.trials)
            enough = lambda points: as_good(points, best(theirs), a.prompts)  # noqa: E731
            searches.append(run_ours(setting, direction, found, 3 * a.trials, startup, seed, journal, enough))
    report(a, policy, theirs, said, ours, searches)


# ------------------------------------------------------------------ Heretic


SIDES = ("positive", "negative")
THEIR_NAMES = {"positive": "bad", "negative": "good"}


def write_prompts(folder: Path, count: int) -> dict[str, Path]:
    """The sets as plain text, those to judge by cut to so many."""
    files = {}
    for side in SIDES:
        for split in ("train", "eval"):
            lines = (FOLDER / f"{side}-{split}.txt").read_text().splitlines()
            files[f"{side}-{split}"] = folder / f"{side}-{split}.txt"
            kept = lines[:count] if split == "eval" else lines
            files[f"{side}-{split}"].write_text("\n".join(kept) + "\n")
    return files


def run_heretic(
    a: argparse.Namespace, folder: Path, files: dict[str, Path], seed: int
) -> tuple[list[Point], list[str]]:
    """Its trials, and its completions of positive prompts, those of the unedited model left out."""
    command = [
        str(a.heretic / "bin" / "heretic"),
        "--model",
        str(a.model),
        "--dtypes",
        '["float32"]',
        "--seed",
        str(seed),
    ]
    command += ["--batch-size", "64", "--max-response-length", str(a.tokens), "--print-responses"]
    command += ["--n-trials", str(a.trials), "--n-startup-trials", str(int(0.3 * a.trials))]
    command += ["--refusal-markers", json.dumps(MARKERS), "--study-checkpoint-dir", str(folder / "theirs")]
    for name, path in files.items():
        side, _, split = name.partition("-")
        flag = f"--{THEIR_NAMES[side]}-{'evaluation-' if split == 'eval' else ''}prompts"
        command += [f"{flag}.dataset", str(path), f"{flag}.split", "null"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100000", "PYTHONUNBUFFERED": "1"}
    print("heretic: running", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, cwd=folder
    )
    if "Optimization finished" not in done.stdout:
        sys.exit(f"heretic ended early:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    (journal,) = (folder / "theirs").glob("*.jsonl")
    points = []
    for trial in journal_of(journal):
        own = trial["attributes"]
        tents = {name: Tent(*(own["parameters"][key][part] for part in PARTS)) for name, key in MODULES.items()}
        kernel = Kernel(tents, own["direction_index"])
        rate = own["refusals"] / own["n_bad_prompts"]
        points.append(Point(trial["end"], trial["end"] - trial["start"], own["kl_divergence"], rate, kernel))
    said = [part.partition("Response: ")[2] for part in done.stdout.split("\nSystem prompt: ")[1:]]
    ends = ("\n\n  * Refusals:", "\n\n* Initial refusals:")
    said = [min((text.partition(end)[0] for end in ends), key=len).strip("\n") for text in said]
    return points, said[a.prompts :]


MODULES = {"attention": "attn.o_proj", "mlp": "mlp.down_proj"}
DATES = {"start": "datetime_start", "end": "datetime_complete"}
PARTS = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")


def journal_of(path: Path) -> list[dict[str, Any]]:
    """Whole trials of an Optuna journal: start and end in seconds since the first began, and what was noted of them."""
    trials: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry["op_code"] == 4:
            trials.append({"number": len(trials), "attributes": entry.get("user_attrs") or {}})
        elif entry["op_code"] == 8:
            trials[entry["trial_id"]]["attributes"] |= entry["user_attr"]
        if entry["op_code"] in (4, 6):
            own = trials[entry.get("trial_id", -1)]
            own |= {key: stamp(entry[name]) for key, name in DATES.items() if entry.get(name)}
    first = trials[0]["start"]
    whole = [trial for trial in trials if "end" in trial]
    return [trial | {"start": trial["start"] - first, "end": trial["end"] - first} for trial in whole]


def stamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# ------------------------------------------------------------------ ours


def asked(line: str) -> list[dict[str, str]]:
    """A prompt as Heretic asks it."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": line}]


def extract(policy: Policy, files: dict[str, Path]) -> Direction:
    """Mean difference at the last prompt token, without the part along the negative mean: Heretic's default."""
    lines = [[asked(line) for line in files[f"{side}-train"].read_text().splitlines()] for side in SIDES]
    positive, negative = (capture.means(policy, capture.encode(policy, side))[1:, 0] for side in lines)
    each = zip(positive, negative, strict=True)
    return Direction({block: directions.projected(p - n, n) for block, (p, n) in enumerate(each)})


def per_token(setting: Setting, direction: Direction, found: list[Any], kernels: list[Kernel]) -> dict[str, float]:
    """Seconds, tokens and seconds per token of whole trials with these kernels, decoded together, KL included."""
    markers, kl = Markers(setting), Divergence(1, setting)
    with Slots(setting.policy, found, len(kernels), direction.width) as slots:
        kl.prepare(slots)
        runner = Runner(slots, markers.prompts, rows=192)  # as `ablate --search` has them
        start = time.perf_counter()
        for slot, kernel in enumerate(kernels, 1):
            slots.set(slot, kernel.edits(found, direction))
            kl.value(slots.logps(slot, kl.texts))
            for i, prompt in enumerate(markers.prompts):
                runner.add(Job(slot, 0, i), slot, prompt)
        while runner.live or runner.waiting:
            for row, _, ended in runner.step():
                row.done = ended or len(row.tokens) >= setting.max_new_tokens
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": runner.tokens, "s_per_token": seconds / runner.tokens}


def run_ours(
    setting: Setting,
    direction: Direction,
    found: list[Any],
    trials: int,
    startup: int,
    seed: int,
    journal: Path,
    enough: Callable[[list[Point]], bool],
) -> list[Point]:
    """Whole trials of one search, and when they were done; it ends when these are enough."""
    done: dict[str, float] = {}
    start = time.perf_counter()

    def points() -> list[Point]:
        kept = [(done.get(f"trial {trial['number']}"), trial["attributes"]) for trial in journal_of(journal)]
        whole = [(at, own["scores"]) for at, own in kept if at is not None and not own["pruned"]]
        return sorted(Point(at, 0.0, kl, rate) for at, (rate, kl) in whole)

    def say(line: str) -> None:
        name = line.partition(":")[0].partition(" (")[0]
        done[name] = time.perf_counter() - start
        print(f"{done[name]:6.1f} s  {line}", file=sys.stderr, flush=True)
        if name.startswith("trial") and enough(points()):
            raise KeyboardInterrupt

    policy, positive, negative, *_ = setting
    options = {"markers": setting.markers, "max_new_tokens": setting.max_new_tokens, "loops": 0.0}
    options |= {"writers": found, "journal": journal, "trials": trials, "startup": startup, "seed": seed, "say": say}
    with suppress(KeyboardInterrupt):
        search.run(policy, direction, positive, negative, **options)
    return points()


# ------------------------------------------------------------------ what came of it


def best(points: list[Point]) -> list[Point]:
    """Those that no other dominates."""
    pairs = [(max(p.kl, FINEST), p.rate) for p in points]
    return [p for p, own in zip(points, pairs, strict=True) if not any(dominates(other, own) for other in pairs)]


def as_good(points: list[Point], theirs: list[Point], prompts: int) -> bool:
    """Whether for each of theirs one of ours has no higher KL and a rate that is not worse beyond chance."""

    def no_worse(one: Point, other: Point) -> bool:
        before, after = (wilson(p.rate * prompts, prompts) for p in (other, one))
        return max(one.kl, FINEST) <= max(other.kl, FINEST) and square_and_add(before, after, 0.0).low <= 0

    return all(any(no_worse(one, other) for one in points) for other in theirs)


def time_to(points: list[Point], theirs: list[Point], prompts: int) -> float | None:
    """Seconds until the front was as good; None where it never was."""
    for i, point in enumerate(points):
        if as_good(points[: i + 1], theirs, prompts):
            return point.at_s
    return None


def report(
    a: argparse.Namespace,
    policy: Policy,
    theirs: list[Point],
    said: list[str],
    ours: dict[str, float],
    searches: list[list[Point]],
) -> None:
    """Tables, then one JSON object as the last line."""
    counts = [min(len(policy.tokenizer.encode(text, add_special_tokens=False)) + 1, a.tokens) for text in said]
    seconds = sum(p.seconds for p in theirs)
    their_token = seconds / sum(counts)
    rows = [("per token", "seconds", "tokens", "ms a token", "theirs : ours")]
    rows.append(("heretic", f"{seconds:.1f}", str(sum(counts)), f"{1e3 * their_token:.2f}", ""))
    ratio = their_token / ours["s_per_token"]
    cells = (f"{ours['seconds']:.1f}", f"{ours['tokens']:.0f}", f"{1e3 * ours['s_per_token']:.2f}", f"{ratio:.2f}")
    rows.append(("mlx-realign", *cells))
    print(launch.table(rows), end="\n\n")
    front = best(theirs)
    end = theirs[-1].at_s
    times = [time_to(points, front, a.prompts) for points in searches]
    rows: list[tuple[str, ...]] = [
        ("to a front", "whole trials", "seconds", "hypervolume", "as good after", "theirs : ours")
    ]
    volume = lambda points: f"{hypervolume([(p.kl, p.rate) for p in points], (1.0, 1.0)):.3f}"  # noqa: E731
    rows.append(("heretic", str(len(theirs)), f"{end:.1f}", volume(theirs), "", ""))
    for seed, points, took in zip(a.seeds.split(","), searches, times, strict=True):
        when = ("never", "") if took is None else (f"{took:.1f}", f"{end / took:.2f}")
        rows.append((f"mlx-realign, seed {seed}", str(len(points)), f"{points[-1].at_s:.1f}", volume(points), *when))
    print(launch.table(rows), end="\n\n")
    for name, points in (
        ("heretic", front),
        *((f"seed {s}", best(p)) for s, p in zip(a.seeds.split(","), searches, strict=True)),
    ):
        shown = sorted({(round(p.kl, 3), round(p.rate, 3)) for p in points})
        print(f"front of {name} (KL, rate): {', '.join(f'({kl}, {rate})' for kl, rate in shown)}")
    known = [took for took in times if took is not None]
    versions = {"mlx-realign": version("mlx-realign"), "mlx": version("mlx"), "heretic": "1.4.0"}
    told = {"machine": launch.machine(), "versions": versions, "model": Path(a.model).name, "prompts": a.prompts}
    told |= {"per_token": {"heretic_s": their_token, **ours, "ratio": ratio}}
    told |= {"heretic": [p[:4] for p in theirs], "ours": [[p[:4] for p in points] for points in searches]}
    told |= {"as_good_after_s": times, "wall_ratio_median": end / statistics.median(known) if known else None}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
