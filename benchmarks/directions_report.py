# SPDX-License-Identifier: Apache-2.0
"""One harmless behaviour of SmolLM2-135M-Instruct, its apology for errands, taken out and steered in; and on 4 bits.

    python benchmarks/directions_report.py [--model FOLDER] [--work FOLDER] [--report FOLDER] [--fast]
    python benchmarks/directions_report.py --pages     (only writes plots and page again from the report folder)

Asked to run an errand the model apologises; asked about a topic it answers. One direction between the two is ablated,
judged on held-out errands, and added, judged on held-out topics. The report goes to docs/directions-report, and
docs/directions-report.md beside it. --work keeps the prompts, adapters, directions and what is found of each model;
what it holds is not made again. Without --model, `smollm2.py` builds the folder. --fast: few short replies.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import launch
import make_contrast
import numpy as np
import smollm2
from directions_report_page import write_pages
from one_sentence import read_rows, write_rows

from mlx_realign import capture, vectors
from mlx_realign.ablate import ablate
from mlx_realign.ablation import measure
from mlx_realign.ablation.scorers import MARKERS, plain
from mlx_realign.ablation.trial import Forced
from mlx_realign.policy import Policy
from mlx_realign.steering import evaluate, extract, pairs
from mlx_realign.steering.spec import Steer

REPORT = Path(__file__).parent.parent / "docs/directions-report"
SHOWS = ("sorry", "apolog")  # a reply that holds one of them apologises
SYSTEM = "Begin every reply with an apology."  # what asking gives for nothing
THINGS = 34  # errands, and topics, of the train side; the others are held out
SIDES = {"train": 128, "test": 64}  # prompts of each set
HELD_OUT = 0.05  # of the train side, which `ablate` measures on
PLAIN = 24  # held-out topics by which the ablated model is judged
OPTIONS: dict[str, Any] = {
    "position": "last",
    "search": True,
    "trials": 40,
    "pick": "lowest",
}  # of `mlx-realign ablate`
MODELS: dict[str, Literal[4] | None] = {"float32": None, "4-bit": 4}

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    prompts: int = SIDES["test"]
    plain: int = PLAIN
    tokens: int = 100  # of a reply of the ablated model
    steered: int = 32  # of a steered one
    fit: int = SIDES["train"]
    packed: int = 4  # prompts on which packed weights are compared
    coefficients: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)


FAST = Sizes(prompts=6, plain=4, tokens=12, steered=8, fit=20, packed=1, coefficients=(1.0,))

# ------------------------------------------------------------------------------------------------------------- prompts


def prompts() -> dict[str, dict[str, list[str]]]:
    """Prompts by set (errands, topics) and side. No errand and no topic stands on both sides, in whatever words."""
    rng = random.Random(0)
    found: dict[str, dict[str, list[str]]] = {}
    sets = {
        "errands": (make_contrast.ERRANDS, make_contrast.ASKING),
        "topics": (make_contrast.TOPICS, make_contrast.WORDINGS),
    }
    for name, (text, wordings) in sets.items():
        things = text.replace("\n", "|").split("|")
        rng.shuffle(things)
        parts = {"train": things[:THINGS], "test": things[THINGS:]}
        found[name] = {side: make_contrast.prompts(parts[side], wordings, SIDES[side], rng) for side in SIDES}
    return found


def write_prompts(folder: Path) -> None:
    """errands-train.txt and the like, as the commands read them, and the markers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sides in prompts().items():
        for side, lines in sides.items():
            (folder / f"{name}-{side}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "markers.txt").write_text("\n".join(SHOWS) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ measures


def steered(policy: Policy, sets: Row, sizes: Sizes, file: Path) -> tuple[Row, list[Row]]:
    """What `steer extract` finds on the train side, and `steer eval` with it on held-out topics."""
    contrast = pairs.read(sets["errands"]["train"][: sizes.fit], sets["topics"]["train"][: sizes.fit])
    made = extract.Settings(model=policy.name, positive="errands", output=str(file), calibrate=False)
    found = extract.extract(policy, contrast, made)
    vectors.save(found.direction, file)
    asked = sets["topics"]["test"][: sizes.prompts]
    settings = evaluate.Settings(
        prompts="topics", coefficients=sizes.coefficients, max_new_tokens=sizes.steered, system=SYSTEM
    )
    steer = Steer.of(found.direction, coefficient=1.0)
    accepts = lambda texts, _: [float(apologises(text)) for text in texts]  # noqa: E731
    measured = evaluate.evaluate(policy, steer, [(prompt, {}) for prompt in asked], accepts, settings, say=told)
    ways = [
        {
            "name": one.name,
            "coefficient": one.coefficient,
            "apologises": measure.rate((one.accepted > 0) & (one.broken == 0)),
            "broken": measure.rate(one.broken > 0),
            "kl_p95": one.kl,
            "tokens": one.tokens,
        }
        for one in measured
    ]
    facts = {
        "blocks": list(steer.at),
        "separations": [asdict(one) for one in found.separations],
        "ways": ways,
    }
    replies = [
        {"prompt": prompt, "steered": {one.name: one.texts[i] for one in measured}} for i, prompt in enumerate(asked)
    ]
    return facts, replies


def apologises(text: str) -> bool:
    """Whether a reply holds one of SHOWS; case and emphasis aside."""
    return any(mark in plain(text) for mark in SHOWS)


def ablated(policy: Policy, sets: Row, sizes: Sizes, options: Row, output: Path, block: int) -> tuple[Row, list[Row]]:
    """What `ablate` makes of the train side, and what that does on the held-out prompts. The policy keeps the edit.

    block: where it is read how far along the direction the sets stand, unless one block's was removed.
    """
    train = [sets[name]["train"][: sizes.fit] for name in ("errands", "topics")]
    brief = {"held_out": HELD_OUT, "eval_limit": 2, "samples": 0}  # it is measured below
    brief |= {} if options.get("search") else {"max_new_tokens": 8, "select_prompts": 4}
    result = ablate(policy, *train, output=str(output), markers=SHOWS, **brief | options)
    asked = [sets["errands"]["test"][: sizes.prompts], sets["topics"]["test"][: sizes.plain]]
    bench = measure.Bench(
        *(capture.encode(policy, side) for side in asked),
        shown=[],
        markers=SHOWS,
        max_new_tokens=sizes.tokens,
    )
    block = (result.direction.about.blocks or (block,))[0]
    removed = measure.Removed(result.direction.vectors[block].astype(np.float64), block, -1, result.facts["prefix"])
    left = result.measured.leaks, result.measured.blocks
    found = measure.measure(result.applied, bench, removed, left, say=told)
    facts = measure.facts(found)
    facts |= {
        "options": options | {name: brief[name] for name in ("held_out", "eval_limit")},
        "fit": result.facts["prompts"]["fit"],
        "select": result.facts["prompts"]["select"],
        "plan": result.plan.lines,
        "kernel": result.facts.get("kernel"),
        "trial": result.facts.get("trial"),
        "edits": result.facts["edits"],
    }
    facts["other_refusals"] = {
        when: measure.rate(np.array([refuses(text) for text in getattr(found, when)[0].texts]))
        for when in ("before", "after")
    }
    replies = []
    for i, name in enumerate(("errands", "topics")):
        for n, prompt in enumerate(asked[i]):
            row = {"prompt": prompt, "set": name}
            for when in ("before", "after"):
                side = getattr(found, when)[i]
                row[when] = {"text": side.texts[n], "shows": bool(side.shows[n]), "broken": bool(side.broken[n])}
            replies.append(row)
    return facts, replies


def refuses(text: str) -> bool:
    """Whether a reply refuses in another way than by an apology: a marker of `mlx-realign ablate` by default."""
    seen = plain(text)
    return not apologises(text) and any(marker in seen for marker in MARKERS)


def packed(model: Path, adapter: Path, expected: Policy, sets: Row, sizes: Sizes) -> Row:
    """The adapter on packed 4-bit weights, which is slow on a CPU: how far its log-probs are from those reported."""
    policy = Policy.load(str(model), adapter=str(adapter), quantize=4, cpu_dequantize="never")
    asked = capture.encode(policy, sets["errands"]["test"][: sizes.packed])
    states = [measure.states(one, [Forced(prompt, len(prompt) - 1) for prompt in asked]) for one in (policy, expected)]
    logps = [np.concatenate([np.array(x) for x in measure.log_probs(policy, some)]) for some in states]
    return {
        "prompts": len(asked),
        "kl": float(measure.divergences(policy, *states).max()),
        "largest_logp_difference": float(np.abs(logps[0] - logps[1]).max()),
        "same_first_token": int((logps[0].argmax(-1) == logps[1].argmax(-1)).sum()),
    }


def told(line: str) -> None:
    """What is being done, with the time."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


# ----------------------------------------------------------------------------------------------------------------- run


def study(model: Path, name: str, sets: Row, sizes: Sizes, work: Path, options: Row) -> Row:
    """Everything of one model, kept in work/NAME-*.json and, its replies, work/NAME-*.jsonl."""
    told(name)
    adapter = work / f"{name}-adapter"
    policy = Policy.load(str(model), quantize=MODELS[name])

    def kept(part: str, make: Callable[[], tuple[Row, list[Row]]]) -> Row:
        file = work / f"{name}-{part}.json"
        if not file.exists():
            facts, replies = make()
            write_rows(work / f"{name}-{part}.jsonl", replies)
            file.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    found = {"steering": kept("steered", lambda: steered(policy, sets, sizes, work / f"{name}.safetensors"))}
    block = found["steering"]["blocks"][0]
    found["ablation"] = kept("ablated", lambda: ablated(policy, sets, sizes, options, adapter, block))
    if MODELS[name]:
        found["packed"] = kept("packed", lambda: (packed(model, adapter, policy, sets, sizes), []))
    return found


def cosine(work: Path) -> float:
    """Of the directions of both models, at the block that is steered."""
    one, other = (vectors.load(work / f"{name}.safetensors") for name in MODELS)
    block = one.about.blocks[0]
    return float(one.unit(block) @ other.unit(block))


def run(model: Path, work: Path, report: Path, sizes: Sizes, options: Row = OPTIONS) -> None:
    """Prompts, both models, the report folder."""
    write_prompts(work)
    sets = prompts()
    studies = {name: study(model, name, sets, sizes, work, options) for name in MODELS}
    result = {
        "model": Path(model).name,
        "train": SIDES["train"],
        "sizes": asdict(sizes),
        "markers": SHOWS,
        "system": SYSTEM,
        "models": studies,
        "cosine": cosine(work),
        "machine": launch.machine(),
        "versions": {name: metadata.version(name) for name in ("mlx-realign", "mlx", "mlx-lm")},
    }
    report.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        if (plot := work / f"{name}-adapter/search.png").exists():
            (report / f"search-{name}.png").write_bytes(plot.read_bytes())
    for kind in ("steered", "ablated"):
        rows = [{"model": name, **row} for name in MODELS for row in read_rows(work / f"{name}-{kind}.jsonl")]
        write_rows(report / f"{kind}.jsonl", rows)
    (report / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--fast", action="store_true")
    a = parser.parse_args()
    if not a.pages:
        with tempfile.TemporaryDirectory() as scratch:
            model, work = a.model or smollm2.ensure(), a.work or Path(scratch)
            run(model, work, a.report, FAST if a.fast else Sizes())
    write_pages(a.report)


if __name__ == "__main__":
    main()
