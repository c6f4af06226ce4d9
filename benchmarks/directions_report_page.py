# SPDX-License-Identifier: Apache-2.0
"""Writes plots and page of `directions_report.py` from docs/directions-report/: no number by hand."""

import json
from pathlib import Path
from typing import Any

from mlx_realign import steerability
from mlx_realign.ablation import measure
from mlx_realign.intervals import Interval
from mlx_realign.steerability import Separation

SHOWN = 4  # samples of a kind on the page, evenly spaced among the held-out prompts: nobody chose them
LENGTH = 260  # characters of a sample

Row = dict[str, Any]

PAGE = """# An apology, taken out and put in

<!-- written by benchmarks/directions_report_page.py from docs/directions-report/ -->
Asked to run an errand ("{errand}"), {model} apologises: {before} of the time on {errands} held-out errands.
One edit of its weights, made from {direction} errands and {direction} topics that it answers{chosen}, brings that to
**{after}**, at {kl:.2f} nats of KL on topics (first token). Added to its states instead, the direction between the two
makes it apologise for ordinary questions ("{topic}"): **{steered}** at coefficient {coefficient:g}, where it did
{plain} without and {system} when a system message asks for it. The same on a model quantised to 4 bits: steered, it
apologises in **{q_steered}**; ablated, apologies go from {q_before} to **{q_after}**, but **{q_broken}** of its replies
are then empty or go round in circles ({q_looped} before).

- **Behaviour**: a reply that holds {markers} ({letters}). Ablated replies count as failures also
  where they are empty or go round in circles; steered ones count only where they do not.
- **Prompts**: {fit} errands and {fit} topics to make directions and edits from, {errands} and {topics} held out:
  steering is judged on all of these topics, an ablation on {plain_prompts} of them. No errand and no topic is on both
  sides, in whatever words. Replies are greedy, of at most {tokens} tokens when ablated
  and {short} when steered.
- **4 bits**: the float weights quantised (groups of 64), then dequantised to float32 at load, which has the quantised
  weights' numbers and is quick on a CPU. Direction and edit are made anew from these weights: the adapter is the exact
  edit of them. The cosine with the float model's direction, at block {block}: {cosine:.3f}. On packed weights
  (`--quantize 4 --cpu-dequantize never`) with this adapter, next-token log-probs of {packed} errands differ by
  {packed_difference:.2g} nats at most and {packed_same} of {packed} first tokens are the same. The
  float32 model is what `smollm2.py` builds, from weights that were of 4 bits (Q4_1) before: this quantises them again.
- **One run**, one choice of prompts, on {cores} cores ({processor}).

```sh
python benchmarks/directions_report.py --work work
```

makes all of this page. Its parts are these commands, on the prompts that it writes to `work/`:

```text
mlx-realign ablate --model MODEL --positive work/errands-train.txt --negative work/topics-train.txt \\
    --markers work/markers.txt {options} --output apology-off
mlx-realign steer extract --model MODEL --positive work/errands-train.txt --negative work/topics-train.txt \\
    --output apology.safetensors
mlx-realign steer eval --steer apology.safetensors --prompts work/topics-test.txt --markers work/markers.txt \\
    --coefficients {coefficients} --max-new-tokens {short} --system "{system_message}"
```

`--quantize 4` on each is the right half of the tables below. `ablate` measures on prompts of its own choice among those
it is given; the numbers here are of `errands-test.txt` and `topics-test.txt`, taken by the same functions.

## Taken out

| | float32: before | after | 4-bit: before | after |
| --- | --- | --- | --- | --- |
{ablation}

In brackets: 95% intervals, Wilson's. {changes} Refuses in other words: any of the default markers of
`ablate` ("I can't", "as an AI" and the like) without an apology. KL(before || after), nats, on {plain_prompts} held-out
topics, at the first token and along the first {kl_tokens} tokens of the model's own replies before, of which perplexity
is too. The directions are from {direction} errands and topics each. {edited}
{search_plot}

## Put in

| | float32: apologises | empty or looping | KL | 4-bit: apologises | empty or looping | KL |
| --- | --- | --- | --- | --- | --- | --- |
{steering}

{topics} held-out topics. The coefficient is times the mean difference at block {block} (4-bit: {q_block}, its own),
which is {share:.0%} of the median length of a state there; it is added at every token. The block is the one that
separates best below. KL(steered || base), nats: 95th percentile over the first 20 tokens of the base's replies to half
of the topics. Prompt only: the system message "{system_message}", no steering.

![share and KL by coefficient](directions-report/strength.png)

## Whether there is a direction

Last prompt token, {fit} prompts each, each half measured along the mean difference of the other half.

| block | length, of the median state | random halves agree (cosine) | d' | AUROC |
| --- | --- | --- | --- | --- |
{separations}

![separation by block](directions-report/separation.png)

## Samples

### Errands, before and after the edit

{errand_samples}

### Topics, before and after the edit

{topic_samples}

### Topics, steered

{steered_samples}

## Limits

{limits}

## Files

- [result.json](directions-report/result.json): every number above, sizes, machine, versions
- [ablated.jsonl](directions-report/ablated.jsonl): all replies before and after the edit, of both models
- [steered.jsonl](directions-report/steered.jsonl): all steered replies, of both models
"""

SEARCH_PLOT = """
![trials of the search, float32](directions-report/search-float32.png)

The same on 4 bits: [search-4-bit.png](directions-report/search-4-bit.png).
"""
LIMITS = """- The behaviour is counted by its words. What the model says instead of an apology is no help: it cannot run
  errands, and without the apology it pretends to, or says something else. The samples show it.
- A steered reply apologises and is seldom an answer to what was asked: the direction holds "this is an errand" too,
  not only the apology.
- Quantised a second time, the model loops in one reply of eight before any edit, and {trials} trials found no edit that
  takes its apologies away and leaves its replies whole.
- {model} is a small model; of larger ones nothing is said here."""


def page(result: Row, ablated: list[Row], steered: list[Row]) -> str:
    """The page of a result and its replies."""
    one, other = (result["models"][name] for name in ("float32", "4-bit"))
    best, q_best = strongest(one), strongest(other)
    base, system = one["steering"]["ways"][0], one["steering"]["ways"][-1]
    sizes = result["sizes"]
    block, packed = one["steering"]["blocks"][0], other["packed"]
    separations = [_separation(s) for s in one["steering"]["separations"]]
    at = next(s for s in separations if s.block == block)
    errands = [row for row in ablated if row["set"] == "errands" and row["model"] == "float32"]
    topics = [row for row in ablated if row["set"] == "topics" and row["model"] == "float32"]
    put_in = [row for row in steered if row["model"] == "float32"]
    flags = {f"--{name.replace('_', '-')}": value for name, value in one["ablation"]["options"].items()}
    options = " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags.items())
    apologises, quantised = one["ablation"]["positive"]["behaviour"], other["ablation"]["positive"]
    return PAGE.format(
        model=result["model"],
        errand=errands[0]["prompt"],
        topic=put_in[0]["prompt"],
        before=_rate(apologises["before"]),
        after=_rate(apologises["after"]),
        kl=one["ablation"]["kl"]["first_token"],
        q_before=_rate(quantised["marked"]["before"]),
        q_after=_rate(quantised["marked"]["after"]),
        q_broken=_rate(quantised["broken"]["after"]),
        q_looped=_rate(quantised["broken"]["before"]),
        chosen=f" and chosen on {one['ablation']['select'][0]} others" if one["ablation"]["kernel"] else "",
        steered=_rate(best["apologises"]),
        q_steered=_rate(q_best["apologises"]),
        coefficient=best["coefficient"],
        plain=_rate(base["apologises"]),
        system=_rate(system["apologises"]),
        errands=sizes["prompts"],
        topics=sizes["prompts"],
        plain_prompts=sizes["plain"],
        fit=sizes["fit"],
        tokens=sizes["tokens"],
        short=sizes["steered"],
        markers=" or ".join(f'"{marker}"' for marker in result["markers"]),
        letters="in any case",
        block=block,
        q_block=other["steering"]["blocks"][0],
        cosine=result["cosine"],
        packed=packed["prompts"],
        packed_difference=packed["largest_logp_difference"],
        packed_same=packed["same_first_token"],
        processor=result["machine"]["processor"],
        cores=result["machine"]["cores"],
        options=options,
        coefficients=",".join(f"{c:g}" for c in sizes["coefficients"]),
        system_message=result["system"],
        ablation=ablation_table(one["ablation"], other["ablation"]),
        changes=_changes(one["ablation"], other["ablation"]),
        kl_tokens=measure.Bench.kl_tokens,
        edited=edited(one["ablation"], other["ablation"]),
        search_plot=SEARCH_PLOT if one["ablation"]["kernel"] else "",
        direction=one["ablation"]["fit"][0],
        steering=steering_table(one["steering"]["ways"], other["steering"]["ways"]),
        share=at.norm / at.median_norm,
        separations=separation_table(separations),
        errand_samples=before_after(errands),
        topic_samples=before_after(topics),
        steered_samples=at_coefficients(put_in),
        limits=LIMITS.format(model=result["model"], trials=one["ablation"]["options"].get("trials", 0)),
    )


KINDS = {"mlp": "MLPs"}
PICKS = {"knee": "the knee of the front", "lowest": "the one that left the fewest apologies (at the least KL)"}


def edited(one: Row, other: Row) -> str:
    """Which matrices lose what, and who chose that."""
    if not one["kernel"]:
        return " ".join(one["plan"])
    trials, select = one["options"]["trials"], one["select"][0]
    told = [
        f"A search chose the edit: {trials} trials on {select} other errands and topics of those; taken is "
        f"{PICKS[one['options'].get('pick', 'knee')]}."
    ]
    for name, study in (("float32", one), ("4-bit", other)):
        kernel, edits = study["kernel"], study["edits"]
        source = "their own block's direction" if kernel["source"] is None else f"that of block {kernel['source']:.1f}"
        tents = ", ".join(
            f"at most {tent['max_weight']:.0%} of it in {KINDS.get(kind, kind)}, at block {tent['position']:.0f}"
            for kind, tent in kernel.items()
            if kind != "source" and tent["max_weight"] > 0
        )
        count = sum(weight != 0 for weight in edits.values())
        told.append(f"For {name} it is trial {study['trial']}: {count} matrices lose {source}, {tents}.")
    return " ".join(told)


def strongest(study: Row) -> Row:
    """The steering with the largest share of whole replies that apologise, of these the weakest."""
    ways = study["steering"]["ways"][1:-1]
    return max(ways, key=lambda way: (way["apologises"]["value"], -way["coefficient"]))


def ablation_table(one: Row, other: Row) -> str:
    """One line per measure, both models side by side."""
    lines = []
    for side, name in (("positive", "errands"), ("negative", "topics")):
        for kind, label in (("behaviour", "apologises or broken"), ("marked", "apologises"), ("broken", "broken")):
            cells = [_rate(m[side][kind][when]) for m in (one, other) for when in ("before", "after")]
            lines.append([f"{name}: {label}", *cells])
        if side == "positive":
            cells = [_rate(m["other_refusals"][when]) for m in (one, other) for when in ("before", "after")]
            lines.append([f"{name}: refuses in other words", *cells])
    kls = [cell for m in (one, other) for cell in ("", f"{m['kl']['first_token']:.3f}")]
    lines.append(["topics: KL of the first token", *kls])
    kls = [
        cell for m in (one, other) for cell in ("", f"{m['kl']['tokens_mean']:.3f} (95%: {m['kl']['tokens_p95']:.2f})")
    ]
    lines.append(["topics: KL along the reply", *kls])
    cells = [f"{m['perplexity'][when]:.2f}" for m in (one, other) for when in ("before", "after")]
    lines.append(["topics: perplexity", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steering_table(one: list[Row], other: list[Row]) -> str:
    """One line per way to run the model."""
    lines = []
    for mine, theirs in zip(one, other, strict=True):
        name = "prompt only" if mine["name"] == "system prompt" else f"coefficient {mine['coefficient']:g}"
        cells = [cell for way in (mine, theirs) for cell in _way(way)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def separation_table(separations: list[Separation]) -> str:
    """One line per block; the best one in bold."""
    at = steerability.best(separations)
    lines = []
    for s in separations:
        cells = [f"{s.norm:.3g}, {s.share:.0%}", f"{s.agreement.value:.2f}", f"{s.d_prime:.1f}", f"{s.auroc.value:.3f}"]
        lines.append(f"| {f'**{s.block}**' if s.block == at else s.block} | {' | '.join(cells)} |")
    return "\n".join(lines)


def before_after(rows: list[Row]) -> str:
    """Replies side by side, evenly spaced."""
    lines = ["| asked | before | after |", "| --- | --- | --- |"]
    for row in picked(rows):
        cells = [_cell(row["prompt"]), *(_cell(row[when]["text"]) for when in ("before", "after"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_coefficients(rows: list[Row]) -> str:
    """Steered replies, a column for each coefficient."""
    names = list(rows[0]["steered"])
    lines = [f"| asked | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for row in picked(rows):
        lines.append(f"| {' | '.join(_cell(text, 120) for text in (row['prompt'], *row['steered'].values()))} |")
    return "\n".join(lines)


def picked(rows: list[Row]) -> list[Row]:
    """SHOWN of the rows, evenly spaced from the first on."""
    return rows[:: max(1, len(rows) // SHOWN)][:SHOWN]


def plots(result: Row, report: Path) -> None:
    """strength.png and separation.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    for color, (name, study) in zip(("tab:blue", "tab:orange"), result["models"].items(), strict=True):
        ways = study["steering"]["ways"][:-1]
        at = [way["coefficient"] for way in ways]
        shares = [way["apologises"] for way in ways]
        ends = ([100 * one[end] for one in shares] for end in ("low", "high"))
        axes[0].plot(at, [100 * one["value"] for one in shares], color=color, marker="o", label=name)
        axes[0].fill_between(at, *ends, color=color, alpha=0.15, linewidth=0)
        if any(broken := [100 * way["broken"]["value"] for way in ways]):
            axes[0].plot(at, broken, color=color, linestyle=":", label=f"{name}, empty or looping")
        axes[1].plot(at, [way["kl_p95"] for way in ways], color=color, marker="o", label=name)
    prompt = result["models"]["float32"]["steering"]["ways"][-1]["apologises"]["value"]
    axes[0].axhline(100 * prompt, color="grey", linewidth=0.8, linestyle="--", label="prompt only")
    axes[0].set_title("held-out topics that it apologises for, %", fontsize=10)
    axes[1].set_title("KL(steered || base), 95th percentile, nats", fontsize=10)
    for axis in axes:
        axis.set_xlabel("coefficient")
        axis.legend(fontsize=8)
    figure.savefig(report / "strength.png", dpi=90)
    separations = [_separation(s) for s in result["models"]["float32"]["steering"]["separations"]]
    steerability.plot(separations, report / "separation.png")


def _separation(row: Row) -> Separation:
    """From JSON, where intervals are lists."""
    intervals: Row = {name: Interval(*row[name]) for name in ("agreement", "auroc")}
    return Separation(**row | intervals)


def _way(way: Row) -> list[str]:
    kl = "" if way["kl_p95"] is None else f"{way['kl_p95']:.2f}"
    return [_rate(way["apologises"]), _rate(way["broken"]), kl]


def _changes(one: Row, other: Row) -> str:
    told = []
    for name, study in (("float32", one), ("4-bit", other)):
        change = study["positive"]["behaviour"]["change"]
        value, low, high = (f"{100 * change[end]:+.0f}" for end in ("value", "low", "high"))
        told.append(f"{value} ({low} to {high}) points for {name}")
    return f"Errands, after minus before, Newcombe's paired interval: {' and '.join(told)}."


def _rate(one: Row) -> str:
    return f"{one['value']:.0%} ({100 * one['low']:.0f} to {100 * one['high']:.0f})"


def _cell(text: str, length: int = LENGTH) -> str:
    flat = " ".join(text.split())
    flat = flat[:length] + " ..." if len(flat) > length else flat or "(nothing)"
    for old, new in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*"), ("_", "\\_")):
        flat = flat.replace(old, new)
    return flat


def write_pages(report: Path) -> None:
    """The plots, and the page beside the folder, from result.json and the replies."""
    read = lambda name: [json.loads(line) for line in (report / name).read_text(encoding="utf-8").splitlines()]  # noqa: E731
    result = json.loads((report / "result.json").read_text(encoding="utf-8"))
    plots(result, report)
    report.with_suffix(".md").write_text(page(result, read("ablated.jsonl"), read("steered.jsonl")), encoding="utf-8")
