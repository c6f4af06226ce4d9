# SPDX-License-Identifier: Apache-2.0
"""What is edited, by how much and why: as told, by what candidates do, or by a search."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from .. import capture, rollout, vectors
from ..errors import UserError
from ..sampling import Sampling
from ..writers import Writer
from . import edit, select, tryout
from .edit import Edit
from .extraction import MEAN, Extracted, Position, Sets
from .scorers import plain
from .settings import Settings, block_of, journal_of, markers_of, most_kl, weight_of
from .variants import FULL_RANK

GLOBALS, MEANS = 3, 2  # candidates of one block that go on to completions, and those of completions' means among them
FIRST_TOKENS = 32  # of completions by which it is told whether they show the behaviour

Say = Callable[[str], None]
Where = tuple[float | None, Position]  # block (None: each its own) and position


@dataclass
class Plan:
    """What is to be done, and why."""

    edits: list[Edit]
    block: float | None  # whose direction all writers lose, also between two; None: each block its own
    position: Position
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    sections: list[tuple[str, str]] = field(default_factory=list)  # of the report: heading, Markdown
    plot: Callable[[Path], None] | None = None  # of the search, into a .png
    rows: dict[int, np.ndarray] | None = None  # what a search takes out of each block, float64 [d]; it may be mixed


def decided(extracted: Extracted, sets: Sets, writers: list[Writer], settings: Settings, say: Say) -> Plan:
    """Block, position and weight: as told, or by what they do."""
    plan, note = Plan([], None, next(iter(extracted.states))), None
    if settings.block == "per-block" and len(extracted.states) == 1:
        named: dict[str, Where] = {f"each block, {said(plan.position)}": (None, plan.position)}
    else:
        chosen = sources(extracted, sets, writers, settings, say)
        plan.tables, plan.facts = [select.table(chosen)], {"selection": select.plain(chosen)}
        named, note = candidates(chosen, settings), chosen.note
        plan.lines += stand_in(settings)
    name, weight, best = next(iter(named)), weight_of(settings), None
    if weight is None or len(named) > 1:
        best = by_completions(extracted, named, sets, writers, settings, plan, say)
    if best:
        name, weight = best.name, best.weight
    elif note:
        plan.lines.append(note)
    weight = 1.0 if weight is None else weight
    plan.block, plan.position = named[name]
    share = shares(settings)
    rows = extracted.by_block(plan.block, plan.position)
    plan.edits = edit.plan(writers, rows, lambda writer: weight * share(writer))
    plan.lines += [
        f"removed: the direction of {name}, weight {weight:g}, {settings.variant}",
        *alone(rows, writers, extracted.none),
    ]
    if plan.block is not None and round(plan.block) != plan.block:
        kept = f"its direction is measured behind block {round(plan.block)}, and kept as that block's in the file"
        plan.lines.append(f"block {plan.block:g} lies between two: {kept}")
    plan.facts |= {"direction": name, "weight": weight}
    return plan


def stand_in(settings: Settings) -> list[str]:
    """What was tried in place of what is delivered, where a trial's one plain projection is not that."""
    several = settings.rank > 1
    other = settings.variant in (*FULL_RANK, "affine")
    delivered = [settings.variant] * other + [f"{settings.rank} directions"] * several
    if not delivered:
        return []
    told = f"tried as plain projections{' of the first direction' if several else ''}"
    return [f"{told}; delivered as {' of '.join(delivered)}, which may do less or more"]


def alone(rows: Mapping[int, np.ndarray], writers: Sequence[Writer], why: str) -> list[str]:
    """Which of the blocks to edit have no direction. UserError where none has one."""
    left = sorted({writer.block for writer in writers} - rows.keys())
    if not left:
        return []
    told = f"block{'s' if len(left) > 1 else ''} {vectors.spans(left)}"
    if all(writer.block in left for writer in writers):
        raise UserError(f"--blocks: nothing to remove from {told}: {why}")
    return [f"{told} left alone: {why}"]


def shares(settings: Settings) -> Callable[[Writer], float]:
    """What the weight is times, by kind of writer."""
    return lambda writer: getattr(settings, f"{writer.kind}_weight")


def candidates(chosen: select.Chosen, settings: Settings) -> dict[str, Where]:
    """What goes on to completions, by name, best first."""
    ranked = chosen.candidates
    of_means = [c for c in ranked if c.position == MEAN][:MEANS]
    taken = [*ranked[:GLOBALS], *(c for c in of_means if c not in ranked[:GLOBALS])]
    named: dict[str, Where] = {}
    if settings.block != "per-block":
        named |= {f"block {c.block}, {said(c.position)}": (c.block, c.position) for c in taken}
    if settings.block in ("auto", "per-block"):
        named |= {f"each block, {said(c.position)}": (None, c.position) for c in taken}
    return named


def sources(extracted: Extracted, sets: Sets, writers: list[Writer], settings: Settings, say: Say) -> select.Chosen:
    """Blocks and positions in order, by bypass, induce and KL."""
    say("which block and position")
    blocks, last = [*extracted.meant], extracted.blocks - 1
    if (block := block_of(settings)) is not None:
        if block > last:
            raise UserError(f"--block {settings.block}: the model has the blocks 0 to {last}.")
        blocks = [block]
    found = {
        (b, p): extracted.removed(b, p, round(b))[0]
        for p in extracted.states
        for b in blocks
        if extracted.differs(b, p)
    }
    if not found:
        raise UserError(extracted.none)
    asked = prompts(extracted, sets, settings)
    tokens = first_tokens(extracted, asked, settings)
    return select.choose(extracted.policy, writers, found, *asked, tokens=tokens, max_kl=most_kl(settings))


def prompts(extracted: Extracted, sets: Sets, settings: Settings) -> list[list[list[int]]]:
    """Token ids of those that candidates are tried on, positives and negatives."""
    most = settings.select_prompts
    return [capture.encode(extracted.policy, side[:most], prefix=extracted.prefix) for side in sets.select]


def first_tokens(extracted: Extracted, asked: Sequence[list[list[int]]], settings: Settings) -> tuple[int, ...]:
    """With which tokens completions that show the behaviour begin; () where few of the positives' show it."""
    sampling = Sampling(max_new_tokens=min(FIRST_TOKENS, settings.max_new_tokens), temperature=0.0)
    marks = [plain(marker) for marker in markers_of(settings)]
    groups: tuple[list[list[int]], list[list[int]]] = ([], [])
    hits = 0
    for i, side in enumerate(asked):
        for [one] in rollout.rollout(extracted.policy, side, sampling):
            shows = any(mark in plain(one.text) for mark in marks)
            groups[0 if shows else 1].append(one.tokens.tolist())
            hits += shows and i == 0
    return select.first_tokens(*groups) if hits >= len(asked[0]) / 2 else ()


def by_completions(
    extracted: Extracted,
    named: dict[str, Where],
    sets: Sets,
    writers: list[Writer],
    settings: Settings,
    plan: Plan,
    say: Say,
) -> tryout.Tried | None:
    """The candidate and the weight that suffice, and into `plan` what was tried; None where markers cannot tell."""
    tried, best = tryout.try_out(
        extracted.policy,
        writers,
        {name: {t: rows[:1] for t, rows in extracted.by_block(*where).items()} for name, where in named.items()},
        *prompts(extracted, sets, settings),
        markers=markers_of(settings),
        weight=weight_of(settings),
        max_kl=most_kl(settings),
        max_new_tokens=min(64, settings.max_new_tokens),
        share=shares(settings),
        say=say,
    )
    if best is None:
        plan.lines.append(
            "by --markers, few replies to the positives show the behaviour: candidates could not be compared by "
            "completions" + ("" if weight_of(settings) else ", and the weight is 1")
        )
        return None
    plan.tables.append(tryout.table(tried, best))
    plan.facts["tried"] = tryout.plain_values(tried)
    if not best.gone or best.kl > most_kl(settings):
        plan.lines.append(
            f"no candidate takes the behaviour away within --max-kl {most_kl(settings):g}: the best leaves "
            f"{best.left:.0%} at a KL of {best.kl:.3f}; --search looks further"
        )
    return best


def searched(extracted: Extracted, sets: Sets, writers: list[Writer], settings: Settings, say: Say) -> Plan:
    """Weights by block, from a search over kernels."""
    from . import pareto, search

    chosen = sources(extracted, sets, writers, settings, say)
    position = chosen.best.position
    direction = extracted.direction(None, position, "", {})
    journal = journal_of(settings)
    found = search.run(
        extracted.policy,
        direction,
        *(side[: settings.select_prompts] for side in sets.select),
        writers=writers,
        journal=journal,
        scorers=settings.scorers,
        trials=settings.trials,
        seed=settings.seed,
        pick=settings.pick,
        max_kl=settings.max_kl,
        rows=3 * settings.batch_size,
        prefix=extracted.prefix,
        markers=markers_of(settings),
        max_new_tokens=settings.max_new_tokens,
        say=say,
    )
    kernel, number = found.chosen.kernel, found.chosen.number
    plan = Plan(found.edits, None if kernel.source is None else round(kernel.source), position, list(found.notes))
    outcome = found.trials, found.scorers, found.base, found.chosen
    plan.tables = [select.table(chosen), pareto.table(*outcome)]
    plan.sections = [("### What the search found", pareto.section(*outcome))]
    plan.lines.append(f"removed: trial {number} of {journal}, states of {said(position)}, {settings.variant}")
    plan.lines += stand_in(settings)
    plan.rows = {
        b: direction.unit(b) if kernel.source is None else direction.at(kernel.source) for b in direction.blocks
    }
    plan.facts = {"selection": select.plain(chosen), "kernel": kernel.plain(), "trial": number}
    plan.facts["search"] = pareto.facts(*outcome)
    plan.plot = lambda path: pareto.plot(*outcome, path)
    return plan


def said(position: Position) -> str:
    """A position in words."""
    return {-1: "last token", MEAN: "completions"}.get(position, f"token {position}")
