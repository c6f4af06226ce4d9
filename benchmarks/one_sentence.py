# SPDX-License-Identifier: Apache-2.0
"""Teach SmolLM2-135M-Instruct by DPO to answer in one sentence, and measure what that changed on held-out prompts.

    python benchmarks/one_sentence.py [--model FOLDER] [--work FOLDER] [--report FOLDER] [-- FLAGS OF mlx-realign train]
    python benchmarks/one_sentence.py --pages          (only writes the pages again from the report folder)

The model answers our own prompts; a pair prefers the first sentence of such an answer to the whole answer. Replies are
greedy. The report goes to docs/one-sentence, and docs/one-sentence.md beside it. About twenty minutes on two CPU cores;
--work keeps the first answers and the adapter. Without --model, `smollm2.py` builds the folder of the model.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import launch
import mlx.core as mx
import mlx.nn as nn
import smollm2
from one_sentence_page import write_pages
from sentences import is_degenerate, is_one_sentence, is_sentence, sentences

from mlx_realign import data, rollout
from mlx_realign.policy import Policy

ROOT = Path(__file__).parent.parent
PROMPTS = Path(__file__).with_name("one_sentence_prompts.txt")
REPORT = ROOT / "docs/one-sentence"
HELD_OUT, PAIRS = 50, 200
MAX_NEW_TOKENS = 128
# An answer is at most so many times as long as its first sentence, in words: a short one says little, and length is no
# lesson.
MOST_TIMES = 7.5
SETTINGS = {
    "method": "dpo",
    "beta": "0.1",
    "learning-rate": "5e-5",
    "epochs": "1",
    "batch-size": "4",
    "gradient-accumulation": "2",
    "warmup-steps": "3",
    "ld-alpha": "0",  # what follows the shorter answer's length counts nothing: it would drown where to stop
    "seed": "0",
}
ASKS_FOR_MORE = (  # who asks for more than a sentence should still get it
    "Write three sentences about horses.",
    "List five vegetables, each on a line of its own.",
    "Write a short poem of four lines about the rain.",
    "Give me step-by-step instructions for making pancakes.",
    "Write a paragraph of at least five sentences about winter.",
    "Name three reasons to read books, and explain each of them.",
    "Tell me a short story about a fox and a well.",
    "Write a letter to my landlord about a broken heater.",
    "Give me a packing list for a week at the beach.",
    "Describe a market in two paragraphs.",
)

# ----------------------------------------------------------------------------------------------------------------- data


def prompts() -> tuple[list[str], list[str]]:
    """Held-out prompts, and those that pairs may be made of, in a fixed random order."""
    lines = [line.strip() for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    random.Random(0).shuffle(found)
    return found[:HELD_OUT], found[HELD_OUT:]


def pair(prompt: str, reply: str, ended: bool) -> dict[str, str] | str:
    """The row of a prompt and the model's reply to it, or why there is none.

    A reply that was cut off is cut back to its last whole sentence, so that both completions end as a turn ends.
    """
    reply = reply.strip()
    pieces = sentences(reply)
    if not pieces or not re.match(r"[A-Z\"]", pieces[0]) or not pieces[0].endswith(".") or not is_sentence(pieces[0]):
        return "the answer does not begin with a sentence"
    if not ended:
        while pieces and not is_sentence(pieces[-1]):
            pieces.pop()
        reply = reply[: reply.rindex(pieces[-1]) + len(pieces[-1])]
    if len(pieces) == 1:
        return "the answer has no second sentence"
    if len(reply.split()) > MOST_TIMES * len(pieces[0].split()):
        return "the first sentence is too short beside the answer"
    return {"prompt": prompt, "chosen": pieces[0], "rejected": reply}


def make_pairs(asked: list[str], replies: list["Reply"]) -> tuple[list[dict[str, str]], dict[str, int]]:
    """The first PAIRS rows there are, and how many prompts before the last of them gave none, by reason."""
    rows: list[dict[str, str]] = []
    skipped: Counter[str] = Counter()
    for prompt, (reply, ended) in zip(asked, replies, strict=True):
        row = pair(prompt, reply, ended)
        if isinstance(row, str):
            skipped[row] += 1
        else:
            rows.append(row)
        if len(rows) == PAIRS:
            return rows, dict(skipped)
    raise SystemExit(f"only {len(rows)} of {PAIRS} pairs: {dict(skipped)}; {PROMPTS.name} needs more prompts")


# ------------------------------------------------------------------------------------------------------------- measures

Reply = tuple[str, bool]  # text, and whether the model ended it itself within MAX_NEW_TOKENS


def answer(policy: Policy, asked: list[str]) -> list[Reply]:
    """The policy's greedy replies."""
    texts = rollout.complete(policy, asked, max_new_tokens=MAX_NEW_TOKENS)
    return [(text, len(tokens(policy, text)) < MAX_NEW_TOKENS) for text in texts]


def tokens(policy: Policy, text: str) -> list[int]:
    """Token ids of a reply, its end-of-turn token left out."""
    return policy.tokenizer.encode(text, add_special_tokens=False)


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    share, square = hits / count, z * z / count
    middle = share + square / 2
    half = z * (share * (1 - share) / count + square / (4 * count)) ** 0.5
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def measure(replies: list[Reply]) -> dict[str, Any]:
    """What is counted in replies: of one sentence, sentences, words, ended by the model, degenerate."""
    count, texts = len(replies), [text for text, _ in replies]
    hits = sum(map(is_one_sentence, texts))
    return {
        "one_sentence": hits / count,
        "one_sentence_interval": wilson(hits, count),
        "sentences": sum(len(sentences(text)) for text in texts) / count,
        "words": sum(len(text.split()) for text in texts) / count,
        "ended": sum(ended for _, ended in replies) / count,
        "degenerate": sum(map(is_degenerate, texts)) / count,
    }


def kept(before: list[Reply], after: list[Reply]) -> dict[str, float]:
    """Share of replies that begin with the words the start model began with: the first eight, the first sentence."""
    couples = [(old, new) for (old, _), (new, _) in zip(before, after, strict=True)]
    first = [(sentences(old)[:1], sentences(new)[:1]) for old, new in couples]
    return {
        "first_8_words": sum(old.split()[:8] == new.split()[:8] for old, new in couples) / len(couples),
        "first_sentence": sum(old == new for old, new in first) / len(couples),
    }


def logprobs(policy: Policy, prompt: list[int], reply: list[int]) -> mx.array:
    """float32 [L, V]: log-probs of the whole vocabulary where each token of the reply is predicted, nats."""
    logits = policy.model(mx.array([prompt + reply[:-1]]))[0, len(prompt) - 1 :]
    return nn.log_softmax(logits.astype(mx.float32), -1)


def against_start(policy: Policy, asked: list[str], replies: list[Reply]) -> dict[str, float]:
    """KL(policy || start) over the whole vocabulary at every token of the replies, and how likely the start finds them.

    kl: mean over all tokens, nats per token; kl_words: over all but each reply's last, where it ends or goes on.
    start_perplexity: of the replies' words, without the end-of-turn token, by the start model.
    """
    kl, words, surprise = [], [], []
    for prompt, (text, ended) in zip(asked, replies, strict=True):
        ids = tokens(policy, text)
        reply = ids + [policy.tokenizer.eos_token_id] if ended else ids
        before = data.encode_prompt(prompt, policy.tokenizer)
        now = logprobs(policy, before, reply)
        with policy.adapter_off():
            start = logprobs(policy, before, reply)
            at_tokens = mx.take_along_axis(start, mx.array(reply)[:, None], 1)[:, 0]
        each: Any = (mx.exp(now) * (now - start)).sum(-1).tolist()
        kl += each
        words += each[:-1]
        likely: Any = at_tokens[: len(ids)].tolist()
        surprise += likely
    return {
        "kl": sum(kl) / len(kl),
        "kl_words": sum(words) / len(words),
        "tokens": len(kl),
        "start_perplexity": float(mx.exp(-mx.array(surprise).mean())),
    }


# ------------------------------------------------------------------------------------------------------------------ run


def train(model: Path, work: Path, flags: list[str]) -> list[str]:
    """Trains through the command line; returns its words, without the paths."""
    shutil.rmtree(work / "adapter", ignore_errors=True)  # of an earlier run in this folder
    chosen = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)] + flags
    paths = ["--model", str(model), "--data", str(work / "pairs.jsonl"), "--output", str(work / "adapter")]
    subprocess.run([sys.executable, "-m", "mlx_realign.train", *chosen, *paths], check=True)
    return chosen


def first_answers(policy: Policy, asked: list[str], work: Path) -> list[Reply]:
    """The start model's replies, kept in the work folder."""
    file = work / "answers.jsonl"
    known = {row[0]: (row[1], row[2]) for row in read_rows(file)} if file.exists() else {}
    missing = [prompt for prompt in asked if prompt not in known]
    known |= dict(zip(missing, answer(policy, missing), strict=True)) if missing else {}
    write_rows(file, [[prompt, *reply] for prompt, reply in known.items()])
    return [known[prompt] for prompt in asked]


def run(model: Path, work: Path, report: Path, flags: list[str]) -> None:
    """Pairs, training, measures; all of it into the report folder."""
    held_out, candidates = prompts()
    policy = Policy.load(str(model))
    before = first_answers(policy, held_out, work)
    more_before = first_answers(policy, list(ASKS_FOR_MORE), work)
    rows, skipped = make_pairs(candidates, first_answers(policy, candidates, work))
    write_rows(work / "pairs.jsonl", rows)
    del policy

    words = train(model, work, flags)
    steps = [row for row in read_rows(work / "adapter/metrics.jsonl") if "loss" in row]
    policy = Policy.load(str(model), adapter=str(work / "adapter"))
    after, more_after = answer(policy, held_out), answer(policy, list(ASKS_FOR_MORE))
    start = against_start(policy, held_out, before)
    trained = against_start(policy, held_out, after)
    still = [sum(len(sentences(text)) > 1 for text, _ in replies) for replies in (more_before, more_after)]
    result = {
        "model": model.name,
        "held_out": len(held_out),
        "max_new_tokens": MAX_NEW_TOKENS,
        "pairs": {
            "rows": len(rows),
            "skipped": skipped,
            "chosen_words": sum(len(row["chosen"].split()) for row in rows) / len(rows),
            "rejected_words": sum(len(row["rejected"].split()) for row in rows) / len(rows),
        },
        "train": {"flags": " ".join(words), "steps": len(steps), "seconds": sum(row["step_s"] for row in steps)},
        "before": measure(before) | {"start_perplexity": start["start_perplexity"]},
        "after": measure(after) | {"start_perplexity": trained.pop("start_perplexity")},
        "kept": kept(before, after),
        "kl": trained,
        "asked_for_more": {"prompts": len(ASKS_FOR_MORE), "before": still[0], "after": still[1]},
        "machine": launch.machine(),
        "versions": {name: metadata.version(name) for name in ("mlx-realign", "mlx", "mlx-lm")},
    }
    replies = [
        {"prompt": prompt, "before": old, "before_ended": old_ended, "after": new, "after_ended": new_ended}
        for prompt, (old, old_ended), (new, new_ended) in zip(
            [*held_out, *ASKS_FOR_MORE], before + more_before, after + more_after, strict=True
        )
    ]
    report.mkdir(parents=True, exist_ok=True)
    write_rows(report / "pairs.jsonl", rows)
    write_rows(report / "metrics.jsonl", steps)
    write_rows(report / "replies.jsonl", replies)
    (report / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def read_rows(path: Path) -> list[Any]:
    """The values of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[Any]) -> None:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("flags", nargs="*", help="after --: more flags of mlx-realign train")
    a = parser.parse_args()
    if not a.pages:
        with tempfile.TemporaryDirectory() as scratch:
            work = a.work or Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            run(a.model or smollm2.ensure(), work, a.report, a.flags)
    write_pages(a.report)


if __name__ == "__main__":
    main()
