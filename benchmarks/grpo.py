# SPDX-License-Identifier: Apache-2.0
"""Time a whole GRPO step, rollout and update, of mlx-realign and of its peers, in turn, on one machine in one run.

    python benchmarks/make_prompts.py MODEL FOLDER
    python benchmarks/grpo.py --data FOLDER --unsloth VENV --mlx-lm-lora VENV --trl VENV [--cases grpo] [--rounds 2]

A step: 4 prompts x 8 completions x 64 tokens at temperature 1, then one update of a LoRA of rank 8 on all linear layers
in float32, with the loss `grpo` and no KL. The reward is the share of the letter e, so no group is all equal. The model
in FOLDER never ends a completion; tokens that were generated are counted all the same. Peers are those of `peers.py`
that train by GRPO, with its BLAS, left out where no VENV is given.

`grpo` gives each its fastest setting: no gradient checkpointing, and as many completions in one backward pass as
--rows says, each number tried as a contestant of its own where the peer has the setting. `grpo-checkpointed` gives each
its leanest: checkpointing, one completion at a time. Seconds are medians over rounds of the median step after the
first, which compiles; rollout and update are that step's parts. A peer that is not done after --limit seconds is ended
and judged by the steps it did. GB are 1e9 bytes. Table, then one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import launch
import peers
import run
import workload
from peers import OURS, Contestant

KEYS = ("unsloth", "mlx-lm-lora", "trl")  # of peers.PEERS
CHOOSE_ROWS = ("unsloth", "trl")  # how many completions go through one backward pass is a setting of theirs
GROUP, TOKENS = 8, 64
COMPLETIONS = workload.BATCH * GROUP
CASES = {"grpo": "GRPO, rollout and update", "grpo-checkpointed": "GRPO, leanest settings"}
REWARD = peers.DRIVERS / "reward.py"


def contestants(case: str, venvs: dict[str, Path], rows: tuple[int, ...], tries: list[str]) -> list[Contestant]:
    """The peers of a case, one for each setting to try. `rows`: completions in one backward pass of the case `grpo`."""
    lean = case == "grpo-checkpointed"
    found = []
    for key, venv in venvs.items():
        peer = peers.PEERS[key]
        flags = ("--checkpoint",) if lean else ()
        ways = {peer.name: flags}
        if key in CHOOSE_ROWS:
            counts = (1,) if lean else rows
            ways = {_named(peer.name, n): ("--rows", str(n), *flags) for n in counts}
        found += [Contestant(label, peer, venv, way) for label, way in ways.items()]
        for setting in (t.split(":", 1)[1] for t in tries if t.split(":", 1)[0] == key):
            way = (*next(iter(ways.values())), "--set", setting)
            found.append(Contestant(f"{peer.name}, {setting}", peer, venv, way))
    return found


def _named(peer: str, rows: int) -> str:
    return peer if rows == COMPLETIONS else f"{peer}, {rows} row{'s' * (rows > 1)} at a time"


def ours(case: str, data: Path, steps: int, flags: list[str]) -> launch.Run:
    """One run of `mlx_realign.train`; seconds come from its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as scratch:
        output, cache = Path(scratch) / "output", Path(scratch) / "cache"
        command = [sys.executable, "-m", "mlx_realign.train", "--method", "grpo", "--json"]
        command += ["--model", data / "model", "--data", data / "prompts.jsonl", "--output", output]
        command += ["--verifier", f"{REWARD}:verify", "--group-size", GROUP, "--max-new-tokens", TOKENS]
        command += ["--temperature", 1.0, "--loss-type", "grpo", "--steps", steps]
        command += ["--batch-size", workload.BATCH, "--max-length", workload.MAX_LENGTH]
        command += ["--lora-rank", workload.RANK, "--lora-alpha", workload.ALPHA, "--save-every", 1000]
        command += ["--learning-rate", workload.LEARNING_RATE, "--lr-schedule", "constant", "--kl-every", 0]
        command += ["--grad-checkpoint"] if case == "grpo-checkpointed" else []
        _, wall, maxrss = launch.run([*map(str, command), *flags], {"MLX_REALIGN_CACHE": str(cache)})
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "rollout_s" in row]
    return launch.Run(
        steps_s=[row["step_s"] for row in rows],
        losses=[row["loss"] for row in rows],
        wall_s=wall,
        maxrss_gb=maxrss,
        mlx_peak_gb=max(row["peak_memory_gb"] for row in rows),
        notes={
            "rollouts_s": [row["rollout_s"] for row in rows],
            "tokens": [round(row["completions/mean_length"] * COMPLETIONS) for row in rows],
        },
    )


def drive(contestant: Contestant, data: Path, steps: int, limit: float, environment: dict[str, str]) -> launch.Run:
    """One run of a peer; launch.Failed where it did no step within `limit` seconds."""
    command = [contestant.venv / "bin/python", peers.DRIVERS / contestant.peer.driver, "--method", "grpo"]
    command += ["--model", data / "model", "--data", data / "prompts.jsonl", "--steps", steps, "--limit", limit]
    command += ["--batch", workload.BATCH, "--group-size", GROUP, "--max-new-tokens", TOKENS]
    command += ["--rank", workload.RANK, "--alpha", workload.ALPHA]
    command += ["--learning-rate", workload.LEARNING_RATE, "--max-length", workload.MAX_LENGTH]
    with tempfile.TemporaryDirectory() as cache:
        clean = {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        text, wall, maxrss = launch.run([*map(str, command), *contestant.flags], environment | clean)
    result = launch.last_json(text)
    if not result["steps_s"]:
        rollouts = ", ".join(f"{s:.0f} s" for s in result["notes"]["rollouts_s"]) or "none finished"
        raise launch.Failed(f"no step within {limit:.0f} s (rollouts: {rollouts}; {maxrss:.2f} GB)")
    return launch.Run(
        steps_s=result["steps_s"],
        losses=result["losses"],
        wall_s=wall,
        maxrss_gb=maxrss,
        mlx_peak_gb=result["mlx_peak_gb"],
        notes=result["notes"],
    )


def summary(done: launch.Run, steps: int) -> dict[str, Any]:
    """One run as numbers, its first step left out where there are more."""
    first = min(1, len(done.steps_s) - 1)
    times = done.steps_s[first:]
    rollouts, tokens = done.notes["rollouts_s"][first:][: len(times)], done.notes["tokens"][first:][: len(times)]
    return {
        "seconds": round(statistics.median(times), 3),
        "rollout_s": round(statistics.median(rollouts), 3),
        "update_s": round(statistics.median(t - r for t, r in zip(times, rollouts, strict=True)), 3),
        "tokens": round(statistics.median(tokens)),
        "tokens_per_second": round(sum(tokens) / sum(rollouts), 1),
        "mlx_peak_gb": None if done.mlx_peak_gb is None else round(done.mlx_peak_gb, 3),
        "maxrss_gb": round(done.maxrss_gb, 3),
        "wall_s": round(done.wall_s, 2),
        "steps_s": [round(s, 3) for s in done.steps_s],
        "rollouts_s": [round(s, 3) for s in done.notes["rollouts_s"]],
        "first_step_only": len(done.steps_s) == 1 < steps,
        "losses": done.losses,
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of the same contestant as numbers."""
    keys = ("seconds", "rollout_s", "update_s", "tokens", "tokens_per_second", "maxrss_gb", "wall_s")
    middle = {key: round(statistics.median(r[key] for r in runs), 3) for key in keys}
    mlx = [r["mlx_peak_gb"] for r in runs if r["mlx_peak_gb"] is not None]
    return {
        **middle,
        "mlx_peak_gb": round(statistics.median(mlx), 3) if mlx else None,
        "first_step_only": any(r["first_step_only"] for r in runs),
        "all_seconds": [r["seconds"] for r in runs],
        "runs": runs,
    }


def compare(case: str, a: argparse.Namespace, venvs: dict[str, Path], environments: dict[str, dict]) -> dict[str, Any]:
    """Run one case: every round pairs a run of ours with one of each peer. Returns the case's JSON."""
    field = contestants(case, venvs, a.rows, a.tries)
    found: dict[str, list[dict]] = {OURS: []} | {c.label: [] for c in field}
    failed: dict[str, str] = {}

    def attempt(label: str, contestant: Contestant | None) -> None:
        if label in failed:
            return
        try:
            if contestant is None:
                done = ours(case, a.data, a.steps, a.ours)
            else:
                done = drive(contestant, a.data, a.steps, a.limit, environments[contestant.peer.name])
        except launch.Failed as error:
            failed[label] = str(error)
            print(f"{case}: {label} failed\n{error}", file=sys.stderr, flush=True)
            return
        found[label].append(summary(done, a.steps))
        print(f"{case}: {label} {found[label][-1]['seconds']} s", file=sys.stderr, flush=True)

    for _ in range(a.rounds):
        for contestant in [c for c in field if c.label not in failed] or [None]:
            attempt(OURS, None)
            if contestant:
                attempt(contestant.label, contestant)
    lengths = json.loads((a.data / "lengths.json").read_text())["prompts"]
    size = f"{workload.BATCH} prompts of {lengths[-1]} tokens x {GROUP} completions x {TOKENS} tokens"
    return {
        "about": f"{CASES[case]}; {size}",
        "steps": a.steps,
        "contestants": {label: medians(runs) for label, runs in found.items() if runs},
        "failed": {label: text.splitlines()[-1] for label, text in failed.items()},
    }


HEADER = ("", "seconds", "rollout", "update", "tokens", "tokens/s", "MLX peak GB", "max RSS GB")


def shown(case: str, result: dict[str, Any]) -> str:
    """The table of one case; the last columns divide each by ours."""
    found = result["contestants"]
    lines: list[tuple[str, ...]] = [(*HEADER, "time : ours", "RSS : ours")]
    for label, row in found.items():
        mlx = "-" if row["mlx_peak_gb"] is None else f"{row['mlx_peak_gb']:.2f}"
        times = [f"{row[key]:.2f}" for key in ("seconds", "rollout_s", "update_s")]
        counts = [f"{row['tokens']:.0f}", f"{row['tokens_per_second']:.0f}", mlx, f"{row['maxrss_gb']:.2f}"]
        by_ours = run.ratios(row, found[OURS]) if OURS in found else ("", "")
        lines.append((label + " (first step)" * row["first_step_only"], *times, *counts, *by_ours))
    failures = "".join(f"\n{label} failed, {why}" for label, why in result["failed"].items())
    return f"\n{case}: {result['about']}; seconds of a step\n{launch.table(lines)}{failures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by make_prompts.py")
    for key in KEYS:
        default = os.environ.get("PEER_" + key.upper().replace("-", "_"))
        about = f"environment of {peers.PEERS[key].name}"
        parser.add_argument(f"--{key}", type=Path, default=default, metavar="VENV", help=about)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated: " + ", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not counted")
    parser.add_argument("--rows", default=f"{COMPLETIONS},{GROUP}",
                        help="completions in one backward pass of a peer, to be tried")  # fmt: skip
    parser.add_argument("--limit", type=float, default=600, help="seconds a peer may train in one run")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="PEER:FIELD=VALUE",
                        help="one more contestant: a peer with another setting of its own")  # fmt: skip
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="last: more flags of mlx-realign train")
    a = parser.parse_args()
    a.data, a.rows = a.data.absolute(), tuple(int(n) for n in a.rows.split(","))
    if wrong := [n for n in a.rows if n < 1 or COMPLETIONS % n]:
        parser.error(f"--rows {wrong[0]}: it has to divide the {COMPLETIONS} completions of a step")
    if unknown := [name for name in a.cases.split(",") if name not in CASES]:
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    venvs = {key: path.absolute() for key in KEYS if (path := getattr(a, key.replace("-", "_")))}
    prepared, results = peers.environments(venvs), {}
    for case in a.cases.split(","):
        results[case] = compare(case, a, venvs, prepared)
        print(shown(case, results[case]), flush=True)
    model = json.loads((a.data / "lengths.json").read_text())["model"]
    head = {"machine": launch.machine(), "versions": peers.versions(venvs), "model": model, "rounds": a.rounds}
    print(json.dumps({**head, "cases": results}))


if __name__ == "__main__":
    main()
