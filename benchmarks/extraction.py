# SPDX-License-Identifier: Apache-2.0
"""Time the extraction of directions by mlx-realign and by repeng, in turn (ours, repeng, ours, repeng ...), in one run.

    python benchmarks/smollm2.py
    python benchmarks/extraction.py --model FOLDER --peers VENV [--pairs 200] [--rounds 5] [--batches 32,8]

VENV has repeng (`peer_drivers/run_repeng.py` says how). Both get the same 200 + 200 prompts, those of
`directions_parity.py`, and the same two cores, in float32. Seconds are from prompts as texts to one vector for every
layer by the same method (repeng's default, `pca_diff`): tokens, hidden states, components; not the time that loading a
model takes, nor that of one extraction before, which is not counted. repeng takes part once for every batch size in
--batches; 32 is its default. ": ours" is the ratio of a repeng run to the run of ours just before it: median, and the
least and the greatest over rounds. Table, then one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import launch

OURS = "mlx-realign"


def extract(model: str, pairs: int, texts: Path) -> dict[str, Any]:
    """Two extractions of ours in this process, seconds of each; `texts` gets what repeng reads."""
    import directions_parity

    from mlx_realign import capture, directions
    from mlx_realign.policy import Policy

    policy, asked = Policy.load(model), directions_parity.contrast(pairs)
    seconds, tokens, sides = [], directions_parity.write(asked, policy, texts), list(zip(*asked, strict=True))
    for _ in range(2):
        start = time.perf_counter()
        prompts = [capture.encode(policy, side) for side in sides]
        positive, negative = (capture.collect(policy, side)[:, :, 0] for side in prompts)
        for block in range(positive.shape[1]):
            if (positive[:, block] != negative[:, block]).any():  # the embeddings of the last token are all the same
                directions.extract("pca", positive[:, block], negative[:, block], variant="centred")
        seconds.append(round(time.perf_counter() - start, 4))
    return {"seconds": seconds, "tokens": tokens}


def compare(a: argparse.Namespace, data: Path) -> dict[str, list[dict[str, Any]]]:
    """Contestant -> one entry per round; each run of repeng has one of ours before it."""
    found: dict[str, list[dict[str, Any]]] = {}

    def run(name: str, command: list[Any]) -> dict[str, Any]:
        text, _, maxrss = launch.run([str(word) for word in command])
        said = launch.last_json(text)
        took = {"seconds": said["seconds"][-1], "tokens": said["tokens"], "maxrss_gb": round(maxrss, 3)}
        found.setdefault(name, []).append(took)
        print(f"{name}: {took['seconds']:.2f} s", file=sys.stderr, flush=True)
        return took

    peer = [a.peers / "bin/python", Path(__file__).parent / "peer_drivers/run_repeng.py"]
    for _ in range(a.rounds):
        for batch in a.batches:
            mine = run(OURS, [sys.executable, __file__, "--model", a.model, "--pairs", a.pairs, "--once", data])
            given = ["--model", a.model, "--data", data, "--rounds", 2, "--batch", batch]
            theirs = run(f"repeng, {batch} at a time", [*peer, *given])
            theirs["ratio"] = theirs["seconds"] / mine["seconds"]
            if theirs["tokens"] != mine["tokens"]:
                raise SystemExit(f"repeng read {theirs['tokens']} tokens, mlx-realign {mine['tokens']}")
    return found


def shown(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table."""
    lines: list[tuple[str, ...]] = [("", "seconds", "tokens/s", "max RSS GB", "time : ours", "least", "greatest")]
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        ratios = [run["ratio"] for run in runs if "ratio" in run] or [1.0]
        of = [f"{x:.2f}" for x in (statistics.median(ratios), min(ratios), max(ratios))]
        rss = max(run["maxrss_gb"] for run in runs)
        lines.append((name, f"{seconds:.2f}", f"{runs[0]['tokens'] / seconds:.0f}", f"{rss:.2f}", *of))
    return launch.table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peers", type=Path, default=os.environ.get("PEER_STEERING"), metavar="VENV")
    parser.add_argument("--pairs", type=int, default=200, help="prompts of each set, 320 at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="32,8", help="of repeng, to be tried")
    parser.add_argument("--once", type=Path, metavar="TEXTS", help="two extractions of ours and nothing else")
    a = parser.parse_args()
    if a.once:
        print(json.dumps(extract(a.model, a.pairs, a.once)))
        return
    if a.peers is None:
        parser.error("--peers is missing: the environment with repeng")
    a.peers, a.batches = a.peers.absolute(), [int(n) for n in a.batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(a, Path(folder) / "pairs.jsonl")
    print(shown(found))
    about = {"machine": launch.machine(), "model": Path(a.model).name, "pairs": a.pairs}
    print(json.dumps({**about, "runs": found}))


if __name__ == "__main__":
    main()
