# SPDX-License-Identifier: Apache-2.0
"""Take a behaviour out of a model by removing its direction from all that writes to the residual stream (abliteration).

    mlx-realign ablate --model M --positive does.txt --negative does-not.txt --markers "I cannot,I won't" --output out
    mlx-realign ablate --model M --positive labelled.jsonl --output out --search --trials 200
    mlx-realign ablate --model M --positive labelled.jsonl --direction extracted.safetensors --output out
    mlx-realign ablate --model M --positive labelled.jsonl --dry-run

Sets: two .txt files with a prompt per line (or .jsonl with "prompt"), or one .jsonl of {"prompt", "label"} rows. The
result is an adapter that stock mlx-lm loads, exact on quantised models too, with what it does on held-out prompts in
report.md and metrics.json, and the direction for mlx-realign steer. It is meant for behaviours that a model should not
have, such as refusing what is harmless; it can break more than it takes away, safeguards among it: read the report, and
what the result is used for is the responsibility of whoever makes it.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from . import adapter, capture, cli, files, flags, steerability, taps, vectors
from . import writers as writers_module
from .ablation import delivery, edit, extraction, measure, planning, report, variants
from .ablation.edit import Applied
from .ablation.extraction import Extracted, Sets
from .ablation.measure import Bench, Measured
from .ablation.planning import Plan, Say
from .ablation.preflight import preflight
from .ablation.settings import Settings, check, journal_of, kl_limit, markers_of
from .errors import UserError
from .policy import Policy
from .steering import pairs
from .steering.pairs import Contrast
from .terminal import Console
from .vectors import Direction
from .writers import Writer

# What a call does not take: it gets a policy that is loaded and prompts, and returns what it found.
COMMAND_ONLY = ("model", "positive", "negative", "adapter", "dtype", "quantize", "cpu_dequantize", "dry_run", "json")


@dataclass
class Result:
    """An ablated policy and what is known of it."""

    policy: Policy
    direction: Direction
    plan: Plan
    applied: Applied
    measured: Measured
    facts: dict[str, Any]  # what metrics.json holds


def main(argv: list[str]) -> int:
    """The command; returns 0."""
    settings = flags.parse(Settings, argv, prog="mlx-realign ablate", doc=__doc__ or "")
    check(settings)
    sides = {"positive_label": settings.positive_label, "paired": settings.paired}
    contrast = pairs.read(settings.positive, settings.negative, **sides)
    contrast = extraction.as_asked(contrast, settings)
    console = Console(stderr=settings.json)
    progress = Console(stderr=True)
    with progress.status(f"loading {settings.model}") as status:
        say = status.update if progress.is_terminal else lambda line: print(line, file=sys.stderr, flush=True)
        loading = ("adapter", "dtype", "quantize", "cpu_dequantize", "trust_remote_code")
        policy = Policy.load(settings.model, **{name: getattr(settings, name) for name in loading})
        for note in policy.notes:
            print(note, file=sys.stderr)
        found = run(policy, contrast, settings, say=say, console=console)
    if settings.json:
        print(json.dumps(_plain(found.facts if isinstance(found, Result) else found), ensure_ascii=False))
    return 0


def ablate(
    policy: Policy,
    positive: pairs.Given,
    negative: pairs.Given | None = None,
    *,
    say: Say = lambda _: None,
    **options: Any,
) -> Result:
    """Ablate a policy in place, from Python, with fields of Settings as options; without `output` nothing is written.

    positive, negative: files as on the command line, or lists of prompts. The policy carries the edit as its adapter
    afterwards (`fuse=True`: in its weights), next to one that it had; `policy.adapter_off()` is the base. Raises
    UserError as the command does.
    """
    if not isinstance(policy, Policy):
        raise UserError("ablate takes a policy: mlx_realign.Policy.load(folder), which holds the model as `model`.")
    fields = {name: field for name, field in flags.fields_of(Settings).items() if name not in COMMAND_ONLY}
    if unknown := next((name for name in options if name not in fields), None):
        raise UserError(f"ablate has no setting {unknown!r}.{flags.nearest(unknown, fields)}")
    values = {name: flags.convert(fields[name].kind, value, name) for name, value in options.items()}
    settings = Settings(**{"model": policy.name, "positive": "prompts", **values})
    check(settings, writes=False)
    contrast = pairs.read(positive, negative, positive_label=settings.positive_label, paired=settings.paired)
    contrast = extraction.as_asked(contrast, settings)
    found = run(policy, contrast, settings, say=say)
    assert isinstance(found, Result)
    return found


def run(
    policy: Policy, contrast: Contrast, settings: Settings, *, say: Say, console: Console | None = None
) -> Result | dict[str, Any]:
    """Everything in order, with the settings checked; of a dry run the facts that it printed."""
    if not settings.output or settings.dry_run:
        return _run(policy, contrast, settings, say, console, None)
    with files.new_folder(Path(settings.output)) as folder:
        return _run(policy, contrast, settings, say, console, folder)


def _run(
    policy: Policy, contrast: Contrast, settings: Settings, say: Say, console: Console | None, folder: Path | None
) -> Result | dict[str, Any]:
    show = console.print if console else lambda *_, **__: None
    sets = extraction.split(contrast, settings)
    say("what writes to the residual stream")
    writers, lines = wanted_writers(policy, settings)
    given, settings = extraction.given(policy, settings)
    preflight(policy, sets, writers, settings)
    extracted = extraction.extract(policy, sets, settings, paired=contrast.paired, say=say, given=given)
    lines = [*contrast.notes, *told_sets(sets), *lines, *told_prefix(extracted), *told_given(extracted, contrast)]
    if settings.dry_run:
        return dry_run(extracted, writers, lines, settings, show)
    decide = planning.searched if settings.search else planning.decided
    plan = decide(extracted, sets, writers, settings, say)
    separations = extracted.separations[plan.position]
    if warning := steerability.warn(separations):
        lines.append(f"warning: {warning}")
    for drawn in (steerability.table(separations), *plan.tables):
        show(drawn)
    applied, more = delivery.put_on(extracted, plan, sets, settings)
    plan.lines = [*lines, *plan.lines, *more]
    for line in plan.lines:
        show(line, highlight=False, markup=False)
    result = measured(extracted, plan, applied, sets, contrast, settings, say)
    show(report.before_after(result.facts["held_out"]))
    for line in (report.along(result.measured), report.left(result.measured), *result.measured.notes):
        show(line, highlight=False, markup=False)
    if folder:
        say("writing")
        save(result, extracted, settings, folder)
        if settings.fuse:
            show(result.facts["stored"]["told"], highlight=False, markup=False)
        show(f"written to {settings.output}; {report_use(settings, result.policy)}", highlight=False, markup=False)
        if settings.search:
            again = f"the same command with --journal {journal_of(settings)} --pick N --output NEW"
            show(f"another trial of this search: {again}", highlight=False, markup=False, soft_wrap=True)
    return result


# ------------------------------------------------------------------ what and where


def wanted_writers(policy: Policy, settings: Settings) -> tuple[list[Writer], list[str]]:
    """The writers to edit, and what should be known of the model's. UserError for blocks that it does not have."""
    every = writers_module.find(policy, settings.writers)
    lines = []
    for rest in writers_module.rest(policy, every)[:3]:
        names = ", ".join(rest.modules) or "no layer of its width"
        lines.append(
            f"warning: block {rest.block} writes {rest.share:.0%} of what it adds by ways that are not known, and that "
            f"is not edited. Layers as wide as the stream: {names}; --writers takes names of more"
        )
    count = len(taps.blocks(policy.model))
    blocks = range(count) if settings.blocks is None else blocks_of(settings.blocks, count)
    chosen = [writer for writer in every if writer.block in blocks]
    if not chosen:
        raise UserError(
            "no layer of this model was found that writes to the residual stream: name them with --writers."
        )
    kinds = {kind: sum(w.kind == kind for w in chosen) for kind in ("attention", "mlp", "experts")}
    told = ", ".join(f"{n} of {kind}" for kind, n in kinds.items() if n)
    gains = sum(writer.gain is not None for writer in chosen)
    lines.append(f"{len(chosen)} writers: {told}" + (f"; {gains} of them through a norm with gains" if gains else ""))
    return chosen, lines


def blocks_of(text: str, count: int) -> set[int]:
    """Blocks of `12`, `8-14` or `3,5,7-9`. UserError where it is none of them, or beyond the model's."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise UserError(f"--blocks {text}: expected blocks such as 12, 8-14 or 3,5,7-9.")
        found |= set(range(int(first), int(last or first) + 1))
    if not found or max(found) >= count:
        raise UserError(f"--blocks {text}: the model has the blocks 0 to {count - 1}.")
    return found


# ------------------------------------------------------------------ measured and written


def measured(
    extracted: Extracted, plan: Plan, applied: Applied, sets: Sets, contrast: Contrast, settings: Settings, say: Say
) -> Result:
    """What the edit did on held-out prompts, with the direction as a file keeps it."""
    policy, position = extracted.policy, plan.position
    bench = Bench(
        *(capture.encode(policy, side) for side in sets.held),
        shown=[_shown(prompt) for side in sets.held for prompt in side],
        markers=markers_of(settings),
        max_kl=kl_limit(settings),
        **{name: getattr(settings, name) for name in ("max_new_tokens", "batch_size", "kl_tokens", "text", "samples")},
    )
    apart = [s for s in extracted.separations[position] if extracted.differs(s.block, position)]
    block = steerability.best(apart) if plan.block is None else plan.block
    say("what is left of the direction")
    blocks = {e.writer.block for e in plan.edits}
    rows = {b: r for b, r in (plan.rows or extracted.by_block(plan.block, position)).items() if b in blocks}
    left = edit.leaks(applied), edit.left_in_blocks(policy, rows)
    removed = measure.Removed(extracted.raw(block, position), round(block), position, extracted.prefix)
    found = measure.measure(applied, bench, removed, left, say=say)
    facts = {
        "settings": dataclasses.asdict(settings),
        "prompts": {name: [len(side) for side in getattr(sets, name)] for name in ("fit", "select", "held")},
        "position": str(position),
        "block": plan.block,
        "prefix": extracted.prefix,
        "separations": [dataclasses.asdict(s) for s in extracted.separations[position]],
        **{name: value for name, value in plan.facts.items() if name != "means"},
        "edits": {e.writer.path: e.weight for e in plan.edits},
        "held_out": measure.facts(found),
    }
    direction = delivery.direction_of(extracted, plan, contrast.hash, found)
    plan.facts["bench"] = bench
    return Result(policy, direction, plan, applied, found, facts)


def save(result: Result, extracted: Extracted, settings: Settings, output: Path) -> None:
    """Adapter or model, direction, metrics, report, plot."""
    plan, policy = result.plan, result.policy
    more = list(plan.sections)
    if settings.fuse:
        stored = variants.save_fused(
            policy.folder,
            output,
            plan.edits,
            settings.variant,
            means=plan.facts.get("means"),
            **{name: getattr(settings, name) for name in ("force", "dequantize", "trust_remote_code")},
        )
        told = delivery.as_stored(policy, plan.edits, stored)
        more.append(("### In the stored weights", told))
        result.facts["stored"] = {**stored._asdict(), "told": told}
    else:
        adapter.save(policy.model, output, base_model=policy.name)
    vectors.save(result.direction, output / "direction.safetensors")
    if importlib.util.find_spec("matplotlib"):
        steerability.plot(extracted.separations[plan.position], output / "separation.png")
        more.append(("### How well each block separates the sets", "![separation by block](separation.png)"))
        if plan.plot:
            plan.plot(output / "search.png")
            more.append(("### What the search tried", "![scores of the trials](search.png)"))
    (output / "metrics.json").write_text(json.dumps(_plain(result.facts), indent=1) + "\n", encoding="utf-8")
    title = f"A direction taken out of {policy.name}"
    text = report.text(title, plan.lines, result.measured, plan.facts["bench"], plan.edits, more)
    (output / "report.md").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------ told


def dry_run(
    extracted: Extracted, writers: list[Writer], lines: list[str], settings: Settings, show: Callable[..., Any]
) -> dict[str, Any]:
    """Print the plan; returns it."""
    each = extracted.separations
    best = max(each, key=lambda position: steerability.apart(steerability.at_best(each[position])))
    show(f"states of {planning.said(best)}, where the sets are furthest apart", highlight=False)
    show(steerability.table(each[best]))
    for position in each:
        if position != best:
            show(f"{planning.said(position)}: {steerability.line(each[position])}", highlight=False, soft_wrap=True)
    edits = edit.plan(writers, np.eye(1, extracted.states[next(iter(extracted.states))][0].shape[-1])[0])
    if left := edit.bias_left(extracted.policy, edits):
        lines.append(f"{len(left)} writers have a bias, which only --fuse edits")
    for line in [*lines, "nothing was written (--dry-run)"]:
        show(line, highlight=False, markup=False)
    told = {str(p): [dataclasses.asdict(s) for s in some] for p, some in each.items()}
    plan = [{"path": w.path, "block": w.block, "kind": w.kind, "gain": w.gain is not None} for w in writers]
    return _plain({"settings": dataclasses.asdict(settings), "plan": lines, "writers": plan, "separations": told})


def told_sets(sets: Sets) -> list[str]:
    """How many prompts of each set are for what."""
    fit, select_, held = ([len(side) for side in part] for part in sets[:3])
    again = "" if sets.apart else " (of the same: there are few)"
    return [
        f"prompts, positive and negative: {fit[0]} and {fit[1]} for the direction, {select_[0]} and {select_[1]} to "
        f"try candidates on{again}, {held[0]} and {held[1]} held out"
    ]


def told_prefix(extracted: Extracted) -> list[str]:
    """What all completions begin with, where they do."""
    if not extracted.prefix:
        return []
    text = extracted.policy.tokenizer.decode(extracted.prefix)
    return [f"all completions begin with {text!r}: states were taken behind it (--no-prefix: before it)"]


def told_given(extracted: Extracted, contrast: Contrast) -> list[str]:
    """Where the vectors are from, where a file gave them."""
    if (given := extracted.given) is None:
        return []
    about, name = given.about, extracted.settings.direction
    lines = [f"vectors of {name} ({about.method}): the prompts for the direction only say how far apart the sets are"]
    if about.data_hash == contrast.hash:
        lines.append(f"warning: {name} is from these very prompts: what is held out here was not held out from it")
    return lines


def report_use(settings: Settings, policy: Policy) -> str:
    """How to run what was written."""
    if settings.fuse:
        return f"use it: mlx_lm.generate --model {settings.output}"
    if settings.quantize:  # mlx_lm.generate would load the weights as they are, and leave some of the direction
        kept = f"--model {settings.model} --quantize {settings.quantize} --adapter {settings.output}"
        return f"use it: mlx-realign generate {kept}"
    name = settings.model if "/" in settings.model or Path(settings.model).exists() else policy.folder
    return f"use it: mlx_lm.generate --model {name} --adapter-path {settings.output}"


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


class _Callable(ModuleType):
    """`mlx_realign.ablate` is this module once anything has imported it, and is to be called like its function."""

    def __call__(self, *args: Any, **options: Any) -> Result:
        return ablate(*args, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))

sys.modules[__name__].__class__ = _Callable
