# SPDX-License-Identifier: Apache-2.0
"""Time mlx-realign against its peers, in turn (ours, peer, ours, peer, ...), on one machine in one run.

    python benchmarks/make_pairs.py MODEL DATA [--prompt-tokens 256]
    python benchmarks/peers.py --model MODEL --data DATA --unsloth VENV --mlx-lm-lora VENV --mlx-lm VENV --trl VENV

Each peer is an installed package in a virtual environment of its own (the drivers in `peer_drivers/` say which), left
out where no VENV is given (flag, or PEER_UNSLOTH and so on in the environment). Every MLX peer gets the same OpenBLAS
that mlx-realign loads. Speed cases give each its fastest setting, memory cases its leanest. Seconds are medians over
rounds of the median step after the first two; GB are 1e9 bytes; "of peak" is the arithmetic a step needs
(`workload.flops_per_step`) per second, over the float32 matmul peak measured in this run. Table, then one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import launch
import run
import workload
from workload import CASES, Case

DRIVERS = Path(__file__).parent / "peer_drivers"
OURS = "mlx-realign"
PAIRS_AND_SFT = ("dpo", "orpo", "cpo", "sft")
COMPARED = {name: case for name, case in CASES.items() if case.rejected == 1}  # no peer reads several rejected


@dataclass(frozen=True)
class Peer:
    """A contestant that is not ours. `cached`: it can compute the reference beforehand; `nll_on_prompt`: the likelihood
    in its ORPO is of prompt and chosen, not of chosen alone."""

    name: str
    driver: str
    package: str
    methods: tuple[str, ...]
    cached: bool
    mlx: bool = True
    nll_on_prompt: bool = False


PEERS = {
    "unsloth": Peer("unsloth_zoo", "run_unsloth.py", "unsloth_zoo", PAIRS_AND_SFT, cached=True, nll_on_prompt=True),
    "mlx-lm-lora": Peer("mlx-lm-lora", "run_mlx_lm_lora.py", "mlx-lm-lora", PAIRS_AND_SFT, cached=False),
    "mlx-lm": Peer("mlx-lm", "run_mlx_lm.py", "mlx-lm", ("sft",), cached=False),
    "trl": Peer("TRL (torch)", "run_trl.py", "trl", PAIRS_AND_SFT, cached=True, mlx=False, nll_on_prompt=True),
}


@dataclass(frozen=True)
class Contestant:
    """A peer with the flags it runs a case with."""

    label: str
    peer: Peer
    venv: Path
    flags: tuple[str, ...]


def contestants(case: Case, venvs: dict[str, Path], tries: list[str]) -> list[Contestant]:
    """The peers of a case. One that cannot compute the reference beforehand takes part with a live one in the cases
    that are about memory or a whole epoch; an epoch is tried both ways by those that can."""
    found = []
    for key, venv in venvs.items():
        peer = PEERS[key]
        if case.method not in peer.methods or (case.nll_on_prompt and not peer.nll_on_prompt):
            continue
        checkpoint = ("--checkpoint",) if case.goal == "memory" else ()
        ways: dict[str, tuple[str, ...]] = {"": checkpoint}
        if case.reference == "cached" and peer.cached:
            ways = {"": ("--precompute", *checkpoint)}
            if case.goal == "epoch":
                ways[", live reference"] = checkpoint
        elif case.reference == "cached" and case.goal == "speed":
            continue
        found += [Contestant(peer.name + name, peer, venv, flags) for name, flags in ways.items()]
        for setting in (t.split(":", 1)[1] for t in tries if t.split(":", 1)[0] == key):
            base = next(iter(ways.values()))
            found.append(Contestant(f"{peer.name}, {setting}", peer, venv, (*base, "--set", setting)))
    return found


def drive(contestant: Contestant, case: Case, model: Path, data: Path, steps: int, environment: dict) -> launch.Run:
    """One run of a peer."""
    command = [contestant.venv / "bin/python", DRIVERS / contestant.peer.driver]
    command += ["--method", case.method, "--model", model, "--data", data / case.rows_file, "--steps", steps]
    command += ["--batch", workload.BATCH, "--rank", workload.RANK, "--alpha", workload.ALPHA]
    command += ["--learning-rate", workload.LEARNING_RATE, "--max-length", workload.MAX_LENGTH]
    with tempfile.TemporaryDirectory() as cache:
        clean = {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        text, wall, maxrss = launch.run([*map(str, command), *contestant.flags], environment | clean)
    result = launch.last_json(text)
    return launch.Run(
        steps_s=result["steps_s"],
        losses=result["losses"],
        wall_s=wall,
        maxrss_gb=maxrss,
        mlx_peak_gb=result["mlx_peak_gb"],
        notes=result["notes"],
    )


def compare(name: str, a: argparse.Namespace, venvs: dict[str, Path], environments: dict[str, dict]) -> dict[str, Any]:
    """Run one case: every round pairs a run of ours with one of each peer. Returns the case's JSON."""
    case, field = CASES[name], contestants(CASES[name], venvs, a.tries)
    steps = run.epoch_steps(case, a.data) if case.goal == "epoch" else a.steps
    flops, lengths = workload.flops_per_step(a.model, case, a.data), workload.lengths(a.data)
    peaks: list[float] = []
    rows: dict[str, list[dict]] = {OURS: []} | {c.label: [] for c in field}
    failed: dict[str, str] = {}

    def attempt(label: str, contestant: Contestant | None, job: Case, count: int, keep: bool = True) -> None:
        if label in failed:
            return
        try:
            if contestant is None:
                done = run.train(job, a.model, a.data, steps=count, flags=a.ours)
            else:
                done = drive(contestant, job, a.model, a.data, count, environments[contestant.peer.name])
        except launch.Failed as error:
            failed[label] = str(error)
            print(f"{name}: {label} failed\n{error}", file=sys.stderr, flush=True)
            return
        if keep:
            rows[label].append(run.summary(label, case, done, flops, peaks[-1]))
            print(f"{name}: {label} {rows[label][-1]['seconds']} s", file=sys.stderr, flush=True)

    everyone: list[tuple[str, Contestant | None]] = [(OURS, None), *((c.label, c) for c in field)]
    if case.goal == "epoch" and not a.no_warm_up:
        for label, contestant in everyone:  # compiled kernels and files are cached by everyone's first run, untimed
            attempt(label, contestant, replace(case, goal="speed"), workload.WARM_UP_STEPS, keep=False)
    for _ in range(a.rounds):
        peaks.append(launch.matmul_peak_gflops(Path(sys.executable)))
        for label, contestant in (pair for pair in everyone[1:] or everyone[:1] if pair[0] not in failed):
            attempt(OURS, None, case, steps)
            if contestant:
                attempt(label, contestant, case, steps)
    peak = statistics.median(peaks)
    return {
        "about": f"{case.about}; prompts of {lengths['prompt']} tokens",
        "lengths": lengths,
        "steps": steps,
        "gflop_per_step": round(flops / 1e9, 1),
        "matmul_peak_gflops": [round(p, 1) for p in peaks],
        "contestants": {label: run.medians(runs, flops, peak, steps, case) for label, runs in rows.items() if runs},
        "failed": {label: text.splitlines()[-1] for label, text in failed.items()},
    }


def shown(name: str, result: dict[str, Any]) -> str:
    """The table of one case; the last columns divide each by ours."""
    found = result["contestants"]
    lines: list[tuple[str, ...]] = [(*run.HEADER, "time : ours", "RSS : ours")]
    for label, row in found.items():
        times = ("", "")
        if OURS in found:
            times = run.ratios(row, found[OURS])
        lines.append((*run.cells({"contestant": label, **row}), *times))
    unit = f"{result['steps']} steps, start-up included" if CASES[name].goal == "epoch" else "a step"
    failures = "".join(f"\n{label} failed, {why}" for label, why in result["failed"].items())
    return f"\n{name}: {result['about']}; seconds of {unit}\n{launch.table(lines)}{failures}"


def environments(venvs: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Peer name -> variables: the same BLAS for every MLX peer, all threads, no network."""
    fast = {"BENCHMARK_BLAS": launch.fast_blas(Path(sys.executable))}
    return {PEERS[key].name: fast if PEERS[key].mlx else {} for key in venvs}


def versions(venvs: dict[str, Path]) -> dict[str, str]:
    """Version of every package that takes part."""
    ask = "import importlib.metadata as m, sys; print(*(m.version(p) for p in sys.argv[1:]))"
    found = {}
    for key, venv in {"": Path(sys.prefix), **venvs}.items():
        packages = ["mlx-realign", "mlx"] if not key else [PEERS[key].package]
        text, _, _ = launch.run([venv / "bin/python", "-c", ask, *packages])
        found |= dict(zip(packages, text.split(), strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder made by make_pairs.py")
    for key, peer in PEERS.items():
        default = os.environ.get("PEER_" + key.upper().replace("-", "_"))
        parser.add_argument(f"--{key}", type=Path, default=default, metavar="VENV", help=f"environment of {peer.name}")
    parser.add_argument("--cases", default=",".join(COMPARED), help="comma-separated: " + ", ".join(COMPARED))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="steps of a run that is not an epoch")
    parser.add_argument("--no-warm-up", action="store_true", help="epochs: no untimed first run")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="PEER:FIELD=VALUE",
                        help="one more contestant: a peer with another setting of its own")  # fmt: skip
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="last: more flags of mlx-realign train")
    a = parser.parse_args()
    a.model, a.data = a.model.absolute(), a.data.absolute()
    venvs = {key: path.absolute() for key in PEERS if (path := getattr(a, key.replace("-", "_")))}
    unknown = [name for name in a.cases.split(",") if name not in COMPARED]
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(COMPARED)}")
    prepared, results = environments(venvs), {}
    for name in a.cases.split(","):
        results[name] = compare(name, a, venvs, prepared)
        print(shown(name, results[name]), flush=True)
    head = {"machine": launch.machine(), "versions": versions(venvs), "model": a.model.name, "rounds": a.rounds}
    print(json.dumps({**head, "cases": results}))


if __name__ == "__main__":
    main()
