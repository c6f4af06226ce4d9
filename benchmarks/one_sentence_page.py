# SPDX-License-Identifier: Apache-2.0
"""Writes the report of `one_sentence.py`: docs/one-sentence.md and docs/one-sentence/samples.md, no number by hand."""

import json
from pathlib import Path
from typing import Any

from sentences import is_one_sentence

SHOWN = 6  # samples of the page, evenly spaced among the held-out prompts: nobody chose them

PAGE = """# One sentence, by DPO

<!-- written by benchmarks/one_sentence_page.py from docs/one-sentence/ -->
{model} answers a question in a paragraph or a list. {pairs} preference pairs of its own answers teach it to
answer in one sentence; what that changed was measured on {held_out} questions that no pair contains.

- **Prompts**: short questions of sixteen topics, written for this (`benchmarks/one_sentence_prompts.txt`).
- **Pairs**: the model's greedy answer is rejected, its first sentence is chosen ({chosen_words:.0f} words against
  {rejected_words:.0f} on average). Both begin alike, so all there is to learn is where to stop. An answer that was cut
  off is cut back to its last whole sentence first. Prompts passed over on the way to {pairs} pairs: {skipped}.
- **Training**: `mlx-realign train {flags}`: {steps} steps.
- **Replies**: greedy, at most {max_new_tokens} new tokens. Sentences are counted by the marks that end them and by line
  ends, so that headings and the items of a list count too.

```sh
python benchmarks/one_sentence.py
```

| {held_out} held-out questions | before | after |
| --- | --- | --- |
{table}

KL(trained || start), exact over the whole vocabulary at all {kl_tokens} tokens of the trained model's replies:
**{kl:.3f} nats per token**; {kl_words:.3f} without the last token of each reply, where it stops.

## What was kept, and what it cost

- How an answer begins: in {first_8_words:.0%} the first eight words are those of before, in {first_sentence:.0%} the
  whole first sentence is.
- Facts are the start model's: the pairs say nothing of right and wrong, and what stood in later sentences is gone.
- Asked for more than one sentence (a list, a poem, a letter, steps), it gives more than one piece in {more_after} of
  {more} prompts; before, in {more_before}.
- Of the {held_out} replies, {long} are not one sentence.{long_list}

## Samples

Every {spacing}th held-out question. All: [samples.md](one-sentence/samples.md).

{samples}

## Files

- [result.json](one-sentence/result.json): every number above, settings, machine, versions
- [pairs.jsonl](one-sentence/pairs.jsonl): the rows it was trained on
- [metrics.jsonl](one-sentence/metrics.jsonl): loss, margins, log-probs of every step
- [replies.jsonl](one-sentence/replies.jsonl): all replies before and after
"""


def page(result: dict[str, Any], replies: list[dict[str, Any]]) -> str:
    """The page of a result and of all replies (held-out ones first)."""
    count, pairs, trained = result["held_out"], result["pairs"], result["train"]
    held_out = replies[:count]
    long = [row["prompt"] for row in held_out if not is_one_sentence(row["after"])]
    spacing = count // SHOWN
    skipped = ", ".join(f"{n} ({why})" for why, n in sorted(pairs["skipped"].items())) or "none"
    more = result["asked_for_more"]
    return PAGE.format(
        model=result["model"],
        held_out=count,
        pairs=pairs["rows"],
        chosen_words=pairs["chosen_words"],
        rejected_words=pairs["rejected_words"],
        skipped=skipped,
        flags=trained["flags"],
        steps=trained["steps"],
        max_new_tokens=result["max_new_tokens"],
        table=table(result),
        kl=result["kl"]["kl"],
        kl_words=result["kl"]["kl_words"],
        kl_tokens=result["kl"]["tokens"],
        first_8_words=result["kept"]["first_8_words"],
        first_sentence=result["kept"]["first_sentence"],
        more=more["prompts"],
        more_before=more["before"],
        more_after=more["after"],
        long=len(long),
        long_list=f" They answer: {'; '.join(long)}" if long else "",
        spacing=spacing,
        samples=samples(held_out[::spacing][:SHOWN]),
    )


def table(result: dict[str, Any]) -> str:
    """One line per measure."""
    before, after = result["before"], result["after"]
    percent = lambda one, name: f"{one[name]:.0%}"  # noqa: E731
    plain = lambda one, name: f"{one[name]:.1f}"  # noqa: E731
    rows = [
        ("replies of exactly one sentence", "one_sentence", percent),
        ("95% interval of that share (Wilson)", "one_sentence_interval", _interval),
        ("sentences per reply", "sentences", plain),
        ("words per reply", "words", plain),
        (f"ended by the model itself within {result['max_new_tokens']} tokens", "ended", percent),
        ("empty, or repeating itself", "degenerate", percent),
        ("perplexity of the replies for the start model", "start_perplexity", lambda one, name: f"{one[name]:.2f}"),
    ]
    return "\n".join(f"| {about} | {show(before, name)} | {show(after, name)} |" for about, name, show in rows)


def _interval(one: dict[str, Any], name: str) -> str:
    low, high = one[name]
    return f"{low:.0%} to {high:.0%}"


def samples(rows: list[dict[str, Any]]) -> str:
    """Before and after, side by side."""
    lines = ["| question | before | after |", "| --- | --- | --- |"]
    for row in rows:
        texts = [row[when] + ("" if row[f"{when}_ended"] else " [cut off]") for when in ("before", "after")]
        lines.append("| " + " | ".join(_cell(text) for text in (row["prompt"], *texts)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    for old, new in (("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(old, new)
    return "<br>".join(line.strip() for line in text.strip().splitlines() if line.strip())


def write_pages(report: Path) -> None:
    """docs/one-sentence.md and samples.md from result.json and replies.jsonl."""
    result = json.loads((report / "result.json").read_text(encoding="utf-8"))
    replies = [json.loads(line) for line in (report / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    report.with_suffix(".md").write_text(page(result, replies), encoding="utf-8")
    count = result["held_out"]
    text = f"# All replies\n\n{samples(replies[:count])}\n\n## Asked for more than one sentence\n\n"
    (report / "samples.md").write_text(text + samples(replies[count:]) + "\n", encoding="utf-8")
