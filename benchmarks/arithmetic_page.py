# SPDX-License-Identifier: Apache-2.0
"""Writes the page of `arithmetic.py`, docs/arithmetic.md, from docs/arithmetic/: no number by hand."""

import json
from pathlib import Path
from typing import Any

SHOWN = 8  # samples of the page, evenly spaced among the held-out problems: nobody chose them
MEASURED = (("eval_reward", ".0%"), ("kl", ".3f"))
FORM = ("unparsed", "cut")
WHEN = ("before", "after")

PAGE = """# Sums, by reinforcement learning

<!-- written by benchmarks/arithmetic_page.py from docs/arithmetic/ -->
{model} adds two numbers from 10 to 99 and is right {before:.0%} of the time. {steps} steps of rlvr, in
which it tries sums and a verifier says which tries are right, bring that to **{after:.0%}** on {test} sums that it
did not train on: {difference} points. The answers are never shown to it.

- **Problems**: `{example}`, asked behind one example that shows the form (`{shown}`: `{said}`). Two numbers
  stand on one side only, in whatever order: {trained} sums to train on, {valid} for the curve below, {test} held out.
- **Training**: `mlx-realign train --config benchmarks/arithmetic.toml{flags}`: LoRA of rank {rank},
  rate {rate:g}, {batch} sums a step, {group} tries each of at most {max_new_tokens} new tokens. Every sum is seen once.
- **Reward**: 1 where the number that the reply comes to is the sum (verifier `{verifier}`), else 0.
- **Took** {minutes:.0f} minutes on {cores} ({processor}{shared}),
  {rollout:.0%} of them generating, with {memory:.1f} GB of MLX memory at most. One run, with one seed.

```sh
python benchmarks/arithmetic.py
```

| {test} held-out sums | before | after | difference, points | rose, fell | p |
| --- | --- | --- | --- | --- | --- |
{table}

In brackets: 95% intervals, over problems; of the difference Newcombe's paired one. p: exact sign test over the
problems that rose or fell. Sampled: {samples} completions of each problem at temperature 1.

## What it learned

- **Adding, or only how to say it?** Of the sampled replies {unparsed_before:.1%} had no number to read before and
  {unparsed_after:.1%} after; of the others {readable_before:.1%} were right before, {readable_after:.1%} after.
  Cut at {max_new_tokens} tokens: {cut_before:.1%} and {cut_after:.1%}.
- **Carrying**: of the {with_carry} sums whose ones digits make ten or more it had {carry_before} right before and
  {carry_after} after (greedy); of the {without_carry} others {plain_before} and {plain_after}.
- **Longer sums** than it trained on, {larger} of numbers from 100 to 999, greedy: {larger_before} before,
  {larger_after} after, {larger_difference} points.
- **Ordinary questions**, {ordinary} of [the other report](one-sentence.md), greedy: {words_before:.0f} words a reply
  before, {words_after:.0f} after; empty or repeating itself {degenerate_before:.0%} and {degenerate_after:.0%}.
  KL(trained || start), exact over the whole vocabulary at the {kl_tokens} tokens of the new replies:
  {kl:.3f} nats per token; {same} of {ordinary} replies are the same to the letter.

## The curve

Reward: mean of the {batch} x {group} tries a step. No signal: share of tries in groups all right or all wrong.
Validation: greedy, {valid} sums neither trained on nor held out. KL: to the start, nats per token of what the start
model says to eight of these.

| steps | reward | | no signal | entropy | validation | KL |
| --- | --- | --- | --- | --- | --- | --- |
{curve}

## Samples

Every {spacing}th held-out sum: the greedy reply, and how many of {samples} sampled ones are right.

{replies}

## Files

- [result.json](arithmetic/result.json): every number above, the recipe, machine, versions
- [metrics.jsonl](arithmetic/metrics.jsonl): every step and evaluation
- [replies.jsonl](arithmetic/replies.jsonl): all replies to the held-out sums, before and after
"""

Row = dict[str, Any]


def page(result: Row, replies: list[Row]) -> str:
    """The page of a result and of the replies to the held-out problems."""
    held, recipe, trained, count = result["held_out"], result["recipe"], result["train"], result["problems"]
    old, new, spacing = held["before"], held["after"], count["test"] // SHOWN
    samples = len(replies[0]["before"]["sampled"]["texts"])
    carry, common = result["carry"], result["ordinary"]
    larger, (_, asked, said, last) = result["larger"], replies[0]["prompt"]
    return PAGE.format(
        model=result["model"],
        before=old["greedy"]["pass@1"]["value"],
        after=new["greedy"]["pass@1"]["value"],
        difference=_points(held["difference"]["greedy"]["pass@1"]),
        example=last["content"],
        shown=asked["content"],
        said=said["content"],
        test=count["test"],
        valid=count["valid"],
        trained=trained["steps"] * recipe["batch_size"] * recipe["gradient_accumulation"],
        flags="".join(f" {word}" for word in trained["flags"].split()),
        steps=trained["steps"],
        rank=recipe["lora_rank"],
        rate=recipe["learning_rate"],
        batch=recipe["batch_size"] * recipe["gradient_accumulation"],
        group=recipe["group_size"],
        max_new_tokens=recipe["max_new_tokens"],
        verifier=recipe["verifier"],
        minutes=trained["seconds"] / 60,
        rollout=trained["rollout_seconds"] / trained["seconds"],
        memory=trained["peak_memory_gb"],
        cores="one core" if trained["cores"] == 1 else f"{trained['cores']} cores",
        processor=result["machine"]["processor"],
        shared=", shared with other work" if trained["shared"] else "",
        table=table(held, samples),
        samples=samples,
        **{f"{name}_{when}": side["sampled"][name]["value"] for when, side in _sides(held) for name in FORM},
        **{f"readable_{when}": readable(side) for when, side in _sides(held)},
        **{f"{name}_{when}": common[when][name] for name in ("words", "degenerate") for when in WHEN},
        **{
            f"{name}_{when}": carry[of][when] for name, of in (("carry", "with"), ("plain", "without")) for when in WHEN
        },
        with_carry=carry["with"]["problems"],
        without_carry=carry["without"]["problems"],
        larger=larger["problems"],
        **{f"larger_{when}": _rate(side["greedy"]["pass@1"]) for when, side in _sides(larger)},
        larger_difference=_points(larger["difference"]["greedy"]["pass@1"]),
        ordinary=common["prompts"],
        same=common["same"],
        kl=common["kl"],
        kl_tokens=common["tokens"],
        curve=curve(result["curve"]),
        spacing=spacing,
        replies=samples_of(replies[::spacing][:SHOWN]),
    )


def table(held: Row, samples: int) -> str:
    """One line per measure of the held-out problems."""
    lines = []
    for mode, name in (("greedy", "pass@1"), ("sampled", "pass@1"), ("sampled", f"pass@{samples}")):
        change = held["difference"][mode][name]
        rates = [_rate(side[mode][name]) for _, side in _sides(held)]
        label = f"right, {mode}" if name == "pass@1" else f"one of {samples} samples right"
        moved = f"{change['higher']}, {change['lower']}"
        lines.append(f"| {label} | {' | '.join(rates)} | {_points(change)} | {moved} | {change['p']:.1g} |")
    for mode in ("greedy", "sampled"):
        lengths = [f"{side[mode]['tokens']['mean']:.1f} ({side[mode]['tokens']['max']})" for _, side in _sides(held)]
        lines.append(f"| tokens (most), {mode} | {' | '.join(lengths)} | | | |")
    return "\n".join(lines)


def curve(points: list[Row]) -> str:
    """One line per stretch of steps, the reward also as a bar."""
    lines = []
    for row in points:
        bar = "█" * round(20 * row["reward"])
        judged, kl = (f"{row[name]:{form}}" if row[name] is not None else "" for name, form in MEASURED)
        shares = f"{row['reward']:.0%} | {bar} | {row['zero_std']:.0%} | {row['entropy']:.2f}"
        lines.append(f"| {row['first']}-{row['last']} | {shares} | {judged} | {kl} |")
    return "\n".join(lines)


def samples_of(replies: list[Row]) -> str:
    """Replies before and after, side by side."""
    lines = ["| sum | before | after |", "| --- | --- | --- |"]
    for row in replies:
        cells = []
        for when in ("before", "after"):
            (text,), (right,) = row[when]["greedy"].values()
            tries = row[when]["sampled"]["right"]
            cells.append(f"{_cell(text)} ({'right' if right else 'wrong'}; {sum(tries)} of {len(tries)})")
        lines.append(f"| {row['prompt'][-1]['content']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def readable(side: Row) -> float:
    """Share of right ones of the sampled replies in which there is a number to read."""
    return side["sampled"]["pass@1"]["value"] / (1 - side["sampled"]["unparsed"]["value"])


def _sides(held: Row) -> tuple[tuple[str, Row], tuple[str, Row]]:
    return ("before", held["before"]), ("after", held["after"])


def _rate(one: Row) -> str:
    return f"{one['value']:.1%} ({100 * one['low']:.0f} to {100 * one['high']:.0f})"


def _points(change: Row) -> str:
    value, low, high = (f"{100 * change[name]:+.1f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _cell(text: str) -> str:
    for old, new in (("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(old, new)
    return "<br>".join(line.strip() for line in text.strip().splitlines() if line.strip())


def write_pages(report: Path) -> None:
    """docs/arithmetic.md from result.json and replies.jsonl."""
    result = json.loads((report / "result.json").read_text(encoding="utf-8"))
    replies = [json.loads(line) for line in (report / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    report.with_suffix(".md").write_text(page(result, replies), encoding="utf-8")
