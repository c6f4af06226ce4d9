# SPDX-License-Identifier: Apache-2.0
"""Trials of which no other is better in everything: the front, which of them to take, a table and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from ..errors import UserError
from ..steering.report import table as markdown
from .kernel import Kernel
from .scorers import Asked, Divergence, Given, Judged, Markers, Scorer

POWER = 1.7  # of an edit's strength that its KL grows with: measured 1.4 to 2.0; 2 is what small ones tend to
NARROW = 0.02  # gaps of the front that are not worth a trial
TITLE = "Pareto front: no other trial is better in everything"
CAPTION = "attention, mlp: weight at the top of a tent, in which block; at its edges, how far away"
MARK = "<-"  # the chosen trial


class Trial(NamedTuple):
    """One kernel and what it was found to do."""

    number: int
    kernel: Kernel
    scores: tuple[float, ...]  # by scorer, small is good; of a pruned trial bounds from below
    pruned: bool = False  # left early, being certain not to reach the front


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is nowhere worse than the other and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(trials: Sequence[Trial], scorers: Sequence[Scorer]) -> list[Trial]:
    """Trials that no other dominates, by the first score; of several with equal scores the first tried."""
    whole = [(coarse(trial.scores, scorers), trial) for trial in trials if not trial.pruned]
    found: dict[tuple[float, ...], Trial] = {}
    for scores, trial in sorted(whole, key=lambda pair: (pair[0], pair[1].scores, pair[1].number)):
        if scores not in found and not any(dominates(other, scores) for other, _ in whole):
            found[scores] = trial
    return list(found.values())


def coarse(scores: Sequence[float], scorers: Sequence[Scorer]) -> tuple[float, ...]:
    """Scores with what is finer than it means anything taken away: how they are compared, and given to the sampler."""
    return tuple(max(score, scorer.finest) for score, scorer in zip(scores, scorers, strict=True))


def weaker(trials: Sequence[Trial], scorers: Sequence[Scorer], base: Sequence[float]) -> list[tuple[Trial, float]]:
    """Trials of the front with what to make their edits times, so that each fills a gap of it; the widest gap first.

    A gap lies between neighbours by cost, which is what the first scorer of given texts (a KL, a perplexity) is above
    the unedited model's, `base`; the unedited model is the first of them. It is as wide as the area it may hide: the
    ratio of the costs, as a logarithm, times the difference of the rate of markers (or what else is generated for). The
    dearer one is made weaker until its cost is halfway down; or the least that means anything, where nothing is there
    yet or not much lies between.
    """
    at = next((i for i, scorer in enumerate(scorers) if isinstance(scorer, Given)), None)
    asked = [i for i, scorer in enumerate(scorers) if isinstance(scorer, Asked)]
    floor = 0.0 if at is None else scorers[at].finest or 0.01 * base[at]
    if at is None or not asked or floor <= 0:
        return []
    other = next((i for i in asked if isinstance(scorers[i], Markers)), asked[0])
    cost = lambda trial: max(trial.scores[at] - base[at], floor)  # noqa: E731
    found: list[tuple[float, Trial, float]] = []
    cheaper, rate, empty = floor, base[other], True
    for trial in sorted(front(trials, scorers), key=lambda t: (cost(t), t.scores[other])):
        if trial.scores[other] >= rate:  # of more than two scores another one keeps it on the front
            continue
        dearer = cost(trial)
        to_floor = cheaper == floor and (empty or dearer < 2 * floor)
        target = 0.9 * floor if to_floor else math.sqrt(cheaper * dearer)
        area = math.log(dearer / cheaper) * (rate - trial.scores[other])
        if area > NARROW:
            found.append((area, trial, (target / dearer) ** (1 / POWER)))
        cheaper, rate, empty = dearer, trial.scores[other], False
    return [(trial, times) for _, trial, times in sorted(found, key=lambda gap: -gap[0])]


def choose(way: str, trials: Sequence[Trial], scorers: Sequence[Scorer]) -> Trial:
    """The trial to take.

    knee: of the front, the one with the smallest sum of scores, each scaled to 0 to 1 over the front (a KL and a
    perplexity by their logarithms): furthest from the chord between the ends. best-kl: the lowest second score among
    those whose first lies within the 95% interval of the lowest. lowest: the lowest first score. A number: that trial.
    UserError where there is none.
    """
    best = front(trials, scorers)
    if way not in ("knee", "best-kl", "lowest"):
        chosen = next((t for t in trials if str(t.number) == way and not t.pruned), None)
        if chosen is None:
            numbers = ", ".join(str(t.number) for t in best)
            raise UserError(
                f"--pick {way}: expected knee, best-kl, lowest or a whole trial's number (best: {numbers})."
            )
        return chosen
    if not best:
        raise UserError(f"--pick {way}: no trial was finished. Let the search go on with more --trials.")
    if way == "lowest":
        return best[0]
    if way == "best-kl":
        first, ceiling = scorers[0], best[0].scores[0]
        if isinstance(first, Asked):
            ceiling = first.interval(ceiling).high
        return min((t for t in best if t.scores[0] <= ceiling), key=lambda t: (t.scores[1], t.scores[0]))
    scaled = np.array([coarse(t.scores, scorers) for t in best])
    for column, scorer in enumerate(scorers):
        if not isinstance(scorer, Asked):
            scaled[:, column] = np.log(np.minimum(np.maximum(scaled[:, column], 1e-9), 1e30))
    low, span = scaled.min(0), np.ptp(scaled, 0)
    return best[int(np.argmin(((scaled - low) / np.where(span > 0, span, 1)).sum(1)))]


def hypervolume(points: Sequence[Sequence[float]], corner: Sequence[float]) -> float:
    """Area that points (x, y), both small is good, dominate below a corner."""
    area, ceiling = 0.0, corner[1]
    for x, y in sorted((x, y) for x, y in points):
        if x < corner[0] and y < ceiling:
            area += (corner[0] - x) * (ceiling - y)
            ceiling = y
    return area


def table(trials: Sequence[Trial], scorers: Sequence[Scorer], base: Sequence[float], chosen: Trial | None) -> Table:
    """The front for the terminal, the unedited model first; the chosen trial is marked."""
    head, unedited, *rows = _cells(trials, scorers, base, chosen)
    made = Table(*head, box=box.SIMPLE_HEAD, title=TITLE, title_justify="left", caption=CAPTION, caption_justify="left")
    made.add_row(*unedited, end_section=True)
    for row in rows:
        made.add_row(*row, style="bold" if row[0].endswith(MARK) else "")
    return made


def section(trials: Sequence[Trial], scorers: Sequence[Scorer], base: Sequence[float], chosen: Trial) -> str:
    """The same for a report, Markdown."""
    head, *rows = _cells(trials, scorers, base, chosen)
    return f"{TITLE}. {MARK} was taken. {CAPTION}.\n\n{markdown(head, rows)}"


def _cells(
    trials: Sequence[Trial], scorers: Sequence[Scorer], base: Sequence[float], chosen: Trial | None
) -> list[list[str]]:
    """Names of columns, the unedited model, the trials of the front and the chosen one."""
    kinds = list(dict.fromkeys(name for trial in trials for name in trial.kernel.tents))
    told = lambda scores: [scorer.told(score) for scorer, score in zip(scorers, scores, strict=True)]  # noqa: E731
    made = [["trial", *(scorer.name for scorer in scorers), "direction of", *kinds]]
    made.append(["unedited", *told(base), "", *("" for _ in kinds)])
    rows = front(trials, scorers)
    for trial in rows if chosen is None or chosen in rows else [*rows, chosen]:
        source = "each block" if trial.kernel.source is None else f"block {trial.kernel.source:.1f}"
        mark = f"{trial.number} {MARK}" if trial == chosen else str(trial.number)
        made.append([mark, *told(trial.scores), source, *(_tent(trial.kernel, name) for name in kinds)])
    return made


def facts(trials: Sequence[Trial], scorers: Sequence[Scorer], base: Sequence[float], chosen: Trial) -> dict[str, Any]:
    """The same as JSON: scores in the order of the scorers, small is good; how many trials there were."""
    best = [{"trial": t.number, "scores": t.scores, "kernel": t.kernel.plain()} for t in front(trials, scorers)]
    return {
        "scorers": [scorer.name for scorer in scorers],
        "unedited": base,
        "front": best,
        "chosen": {"trial": chosen.number, "scores": chosen.scores},
        "trials": len(trials),
        "pruned": sum(trial.pruned for trial in trials),
    }


def _label(scorer: Scorer) -> str:
    """Of an axis: what is counted, on how many prompts."""
    if isinstance(scorer, Asked):
        wrong = "wrong" if isinstance(scorer, Judged) and scorer.right else "shown"
        named = "shown, or broken" if isinstance(scorer, Markers) else f"{scorer.name}: share {wrong}"
        return f"{named}, of {len(scorer.prompts)} replies"
    if isinstance(scorer, Divergence):
        tokens = "first token" if scorer.tokens == 1 else f"first {scorer.tokens} tokens"
        return f"KL of the {tokens}, nats, {len(scorer.prompts)} prompts (below {scorer.finest:g} drawn there)"
    return scorer.name


def _tent(kernel: Kernel, name: str) -> str:
    tent = kernel.tents[name]
    return f"{tent.max_weight:.2f} at {tent.position:.1f}, {tent.min_weight:.2f} at \u00b1{tent.distance:.1f}"


def plot(
    trials: Sequence[Trial], scorers: Sequence[Scorer], base: Sequence[float], chosen: Trial | None, path: str | Path
) -> None:
    """First score over second, all trials, the front as a line. UserError where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install 'mlx-realign[search]'") from error
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    points = {trial.number: coarse(trial.scores, scorers)[1::-1] for trial in trials}  # (second, first)
    for pruned, label in ((True, "pruned: at least this bad"), (False, "trials")):
        some = [points[trial.number] for trial in trials if trial.pruned == pruned]
        if some:
            face = "none" if pruned else "tab:blue"
            axes.scatter(*zip(*some, strict=True), s=16, facecolors=face, edgecolors="tab:blue", alpha=0.5, label=label)
    best = [points[trial.number] for trial in front(trials, scorers)[::-1]]
    axes.plot(*zip(*best, strict=True), drawstyle="steps-post", color="tab:orange", marker="o", ms=4, label="front")
    axes.scatter(*coarse(base, scorers)[1::-1], marker="s", color="black", label="unedited")
    if chosen is not None:
        star = {"marker": "*", "s": 140, "color": "tab:red", "zorder": 3}
        axes.scatter(*points[chosen.number], label=f"trial {chosen.number}", **star)
    if all(second > 0 for second, _ in points.values()):
        axes.set_xscale("log")
    axes.set(xlabel=_label(scorers[1]), ylabel=_label(scorers[0]))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
