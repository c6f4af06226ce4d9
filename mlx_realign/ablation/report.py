# SPDX-License-Identifier: Apache-2.0
"""What `ablate` tells: tables for the terminal, report.md, facts for metrics.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ..steering.report import table as markdown
from .edit import Edit
from .measure import Bench, Measured, facts

RATES = (("behaviour", "shown, or broken"), ("marked", "shown, by a marker"), ("broken", "empty or degenerate"))


def before_after(found: Mapping[str, Any]) -> Table:
    """Rates of both sets, KL and perplexity, for the terminal. found: what `measure.facts` gave."""
    drawn = Table(box=box.SIMPLE_HEAD, title="held-out prompts", title_justify="left")
    for name in ("", "before", "after"):
        drawn.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for line in _lines(found):
        drawn.add_row(*line)
    return drawn


def _lines(found: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for side in ("positive", "negative"):
        for name, label in RATES:
            rate = found[side][name]
            if name != "marked" or rate["before"]["value"] != found[side]["behaviour"]["before"]["value"]:
                lines.append([f"{side}s: {label}", share(rate["before"]), share(rate["after"])])
    kl = found["kl"]
    lines.append(["KL to the base, first token", "0", f"{kl['first_token']:.3f}"])
    told = f"{kl['tokens_mean']:.3f} (95%: {kl['tokens_p95']:.3f})"
    lines.append([f"KL along {kl['count']} tokens", "0", told])
    lines.append(["perplexity", *(f"{found['perplexity'][when]:.2f}" for when in ("before", "after"))])
    return lines


def share(rate: Mapping[str, Any]) -> str:
    """12.0% (5.6 to 23.8)"""
    return f"{rate['value']:.1%} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def leak_lines(edits: Sequence[Edit], leaks: Mapping[str, float]) -> list[list[str]]:
    """Path, kind, weight, share left."""
    rows = []
    for edit in edits:
        path = edit.writer.path
        rows.append([f"`{path}`", edit.writer.kind, f"{edit.weight:.3g}", f"{leaks.get(path, 1.0):.2g}"])
    return rows


def text(title: str, plan: Sequence[str], measured: Measured, bench: Bench, edits: Sequence[Edit], more: Any) -> str:
    """The report, Markdown. plan: sentences; more: sections (heading, text) between the numbers and the samples."""
    found = facts(measured)
    parts = [f"# {title}", "\n".join(f"- {line}" for line in [*plan, *(f"**{note}**" for note in measured.notes)])]
    parts += ["## Held-out prompts, before and after", markdown(["", "before", "after"], _lines(found))]
    changes = []
    for side in ("positive", "negative"):
        c = found[side]["behaviour"]["change"]
        told = f"{100 * c['value']:+.1f} points ({100 * c['low']:+.1f} to {100 * c['high']:+.1f}), p {c['p']:.2g}"
        changes.append(f"{side}s {told}")
    parts.append(
        f"Change of the behaviour: {'; '.join(changes)}. Intervals: 95%, Wilson's, and Newcombe's paired one for the "
        f"change; p: sign test. Greedy completions of up to {bench.max_new_tokens} tokens; empty and degenerate ones "
        "count as the behaviour. KL(base || edited), nats, on the negatives: at the first token and along the base's "
        "own completions."
    )
    parts += ["## Over-ablation", along(measured)]
    parts += ["## What is left of the direction", left(measured), *[item for pair in more for item in pair]]
    head = ["writer", "kind", "weight", "share left in what it gives"]
    parts += ["### By writer", markdown(head, leak_lines(edits, measured.leaks))]
    parts += ["## Side by side", *samples(measured, bench)]
    return "\n\n".join(parts) + "\n"


def along(found: Measured) -> str:
    """Where the sets stand on the direction."""
    a = found.along
    return (
        "On the direction, where it was taken from, with the negatives' mean at 0 and the positives' at 1 before: the "
        f"positives stand at {a['positives_after']:.2f} after, the negatives at {a['negatives_after']:.2f}. Negatives "
        "far from 0, or positives far below it, are damage. Positives may stay near 1 where weights are partial or "
        "each block loses its own direction: the rates say whether the behaviour is gone."
    )


def left(found: Measured) -> str:
    """How much of the direction still comes through."""
    worst = max(found.leaks, key=found.leaks.__getitem__, default="")
    if not worst:
        return "No writer was edited."
    blocks = max(found.blocks.values(), default=0.0)
    return (
        f"Of what a writer gives along the direction, at most {found.leaks[worst]:.2g} is left (`{worst}`); of what a "
        f"whole block adds to the stream, at most {blocks:.2g} lies along it. At weight 1 that is rounding; a weight w "
        "leaves |1 - w| in the first writer, and about as much in later ones, which read what the edits before them "
        "changed. Over random tokens, root mean square. Token embeddings are left alone."
    )


def samples(found: Measured, bench: Bench) -> list[str]:
    """Prompts with both replies."""
    parts = []
    counts = len(bench.positive), len(bench.negative)
    for i, name in enumerate(("positive", "negative")):
        for n in picks(counts[i], bench.samples):
            asked = bench.shown[n + (counts[0] if i else 0)]
            old, new = found.before[i], found.after[i]
            replies = [
                f"**before**{_mark(old, n)}: {_quoted(old.texts[n])}",
                f"**after**{_mark(new, n)}: {_quoted(new.texts[n])}",
            ]
            parts.append("\n>\n".join([f"> _{name}_: {_quoted(asked)}", *(f"> {reply}" for reply in replies)]))
    return parts


def picks(count: int, most: int) -> list[int]:
    """Up to `most` of `count`, evenly apart."""
    step = max(1, count // most) if most else count + 1
    return list(range(0, count, step))[:most]


def _mark(side: Any, n: int) -> str:
    return " (broken)" if side.broken[n] else " (shows it)" if side.shows[n] else ""


def _quoted(said: str) -> str:
    """On one line, and not read as Markdown."""
    flat = " ".join(said.split())
    for sign in "\\`*_[]<>|#":
        flat = flat.replace(sign, "\\" + sign)
    return (flat[:400] + " ...") if len(flat) > 400 else flat or "(nothing)"
