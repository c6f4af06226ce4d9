# SPDX-License-Identifier: Apache-2.0
"""Judged completions -> rates with intervals, the difference problem by problem, and the table of `evaluate`."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from .evaluate_answers import Answers, Judged
from .intervals import clustered, paired, pass_at_k, sign_test
from .terminal import Console
from .verifiers import Verifier

WIDE_COLUMNS = 100  # from here on an interval stands beside its share instead of below it


class Rate(NamedTuple):
    """A share by problem."""

    values: np.ndarray  # float64 [P], 0 to 1, NaN where nothing of the problem's was judged
    units: np.ndarray  # float64 [P], completions (for pass@k: sets of k) behind each


def rates(answers: Answers, judges: Sequence[Verifier], ks: Sequence[int]) -> dict[str, Rate]:
    """By problem: "pass@k" for each k, "format" (where a verifier judges form), "unparsed" and "cut"."""
    right = [[one.right for one in group if one.right is not None] for group in answers]
    found = {}
    for k in ks:
        values = [pass_at_k(len(group), sum(group), k) for group in right]
        found[f"pass@{k}"] = Rate(np.array(values, float), np.array([len(group) // k for group in right], float))
    shares: dict[str, Callable[[Judged], bool | None]] = {
        "format": lambda one: one.form,
        "unparsed": lambda one: None if one.right is None else one.unparsed,
        "cut": lambda one: one.cut,
    }
    if not any(judge.shaping for judge in judges):
        del shares["format"]
    for name, of in shares.items():
        known = [[value for value in map(of, group) if value is not None] for group in answers]
        values = [sum(group) / len(group) if group else math.nan for group in known]
        found[name] = Rate(np.array(values, float), np.array([len(group) for group in known], float))
    return found


def summarise(answers: Answers, judges: Sequence[Verifier], ks: Sequence[int]) -> dict[str, Any]:
    """What `evaluate` returns of one mode: the rates with intervals, lengths, reward, scores and reasons."""
    every = [one for group in answers for one in group]
    rewards = [one.reward for one in every if not math.isnan(one.reward)]
    lengths = [one.tokens for one in every]
    scores, reasons = {}, {}
    for i, judge in enumerate(judges):
        said = [one.verdicts[i] for one in every]
        given = [verdict.score for verdict in said if verdict.score is not None]
        scores[judge.spec] = sum(given) / len(given) if given else None
        reasons[judge.spec] = dict(Counter(verdict.reason for verdict in said if verdict.reason))
    return {
        **{name: _estimate(rate) for name, rate in rates(answers, judges, ks).items()},
        "tokens": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "scores": scores,
        "reasons": reasons,
        "completions": len(every),
        "unjudged": sum(one.right is None for one in every),
    }


def compare(before: Answers, after: Answers, judges: Sequence[Verifier], ks: Sequence[int]) -> dict[str, Any]:
    """after - before of every rate on the same problems: {value, low, high, higher, lower, p}."""
    old, new = rates(before, judges, ks), rates(after, judges, ks)
    found = {}
    for name in new:
        a, b = old[name].values, new[name].values
        both = paired(a, b, np.minimum(old[name].units, new[name].units))
        higher, lower = int((b > a).sum()), int((b < a).sum())
        found[name] = _finite(both._asdict()) | {"higher": higher, "lower": lower, "p": sign_test(higher, lower)}
    return found


def write(found: dict[str, Any], console: Console) -> None:
    """The table, and below it what the numbers are made of."""
    console.print(table(found, wide=console.width >= WIDE_COLUMNS))
    for line in remarks(found):
        console.print(line, highlight=False, markup=False)


def table(found: dict[str, Any], *, wide: bool = True) -> Table:
    """One line per measure: its share and interval; with `before`, both sides, the difference and its p."""
    title = " ".join(filter(None, [found["model"], found["adapter"] and f"+ {found['adapter']}", "on", found["data"]]))
    drawn = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    drawn.add_column("measure", no_wrap=True)
    compared, join = "before" in found, (" " if wide else "\n").join
    for name in ("before", "after", "difference", "rose,\nfell", "p") if compared else ("share", "95% interval"):
        drawn.add_column(name, justify="right")
    for label, mode, name in _lines(found):
        now = found[mode][name]
        if not compared:
            drawn.add_row(label, *_cells(now))
            continue
        cells = [join(filter(None, _cells(side))) for side in (found["before"][mode][name], now)]
        if change := found["difference"][mode].get(name):
            cells += [join(_change(change)), f"{change['higher']}, {change['lower']}", f"{change['p']:.2g}"]
        drawn.add_row(label, *cells)
    return drawn


def remarks(found: dict[str, Any]) -> list[str]:
    """Counts, reasons, and how the intervals were made, one line each."""
    modes = _modes(found)
    first = f"{found['problems']} problems, one greedy"
    first += f" and {found['samples']} sampled completions of each" if "sampled" in found else " completion of each"
    first += ", before and after" if "before" in found else ""
    first += f"; rows left out: {found['left_out']}" if found["left_out"] else ""
    lines = [first + (f"; {found['seconds']:.0f} s" if "seconds" in found else "")]
    for side, name in ((found.get("before", {}), "before, "), (found, "after, " if "before" in found else "")):
        for mode in [mode for mode in modes if mode in side]:
            for spec, counts in side[mode]["reasons"].items():
                if counts:
                    said = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
                    lines.append(f"{name}{mode}, {spec}: {said}")
            if unjudged := side[mode]["unjudged"]:
                lines.append(f"{name}{mode}: {unjudged} completions, judged neither right nor wrong, do not count")
    lines += [f"{spec}: {trouble}" for spec, trouble in found.get("troubles", {}).items()]
    lines.append("Intervals: 95%, Wilson's; of samples at the effective number of trials, problems being clusters.")
    if "before" in found:
        lines.append(
            "Difference: in points, with Newcombe's paired interval. p: exact sign test over the problems that rose or "
            "fell (for greedy completions that is McNemar's test)."
        )
    return lines


def _estimate(rate: Rate) -> dict[str, Any]:
    return _finite(clustered(*rate)._asdict()) | {"problems": int((~np.isnan(rate.values)).sum())}


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def _modes(found: dict[str, Any]) -> list[str]:
    return [mode for mode in ("greedy", "sampled") if mode in found]


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(label, mode, key) of the table's lines: each measure greedy, then sampled."""
    modes = _modes(found)
    labels = {"format": "form right", "cut": f"cut at {found['max_new_tokens']}", "tokens": "tokens (most)"}
    passes = [key for key in found[modes[-1]] if key.startswith("pass@")]
    for key in (*passes, "format", "unparsed", "cut", "tokens", "reward"):
        for mode in modes:
            if key in found[mode]:
                yield f"{labels.get(key, key)}, {mode}", mode, key


def _cells(value: Any) -> tuple[str, str]:
    """A measure and what stands beside it: a rate and its interval, mean and longest length, mean reward."""
    if isinstance(value, dict) and "mean" in value:
        return f"{value['mean']:.1f}", f"({value['max']})"
    if isinstance(value, dict):
        interval = f"{100 * value['low']:.1f}-{100 * value['high']:.1f}"
        return ("-", "") if value["value"] is None else (f"{value['value']:.1%}", interval)
    return "-" if value is None else f"{value:.3f}", ""


def _change(change: dict[str, Any]) -> tuple[str, ...]:
    if change["value"] is None:
        return ("-",)
    value, low, high = (f"{100 * change[name]:+.1f}" for name in ("value", "low", "high"))
    return value, f"{low} to {high}"
