# SPDX-License-Identifier: Apache-2.0
"""Make rows of given lengths, in tokens of a model's own tokenizer and template, for the runs of `mac.py`.

    python benchmarks/mac_texts.py MODEL FOLDER --tokens 512,1024 [--rows 16]     sft-512.jsonl, dpo-512.jsonl ...
    python benchmarks/mac_texts.py MODEL FOLDER --mixed short --rows 400          mixed.jsonl, pairs with those lengths

A row of sft has a prompt of about a tenth and one completion; one of dpo a prompt of half and two completions of the
other half each, so that prompt and completion have so many tokens in both; prompts.jsonl: the prompts of --tokens
alone. FOLDER/lengths.json, written last, has what the rows came to.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

HERE = Path(__file__).parent
WORDS = "time year people way day man thing woman life child world school state family student group country".split()
WORDS += "problem hand part place case week company system program question work number night point home".split()
TRIES = 8


class Writer:
    """Texts of so many tokens."""

    def __init__(self, model: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.random = random.Random(0)

    def words(self, count: int) -> str:
        """So many words."""
        return " ".join(self.random.choices(WORDS, k=max(count, 1)))

    def fitted(self, length_of: Callable[[str], int], wanted: int) -> str:
        """Words whose text has at most so many tokens, and few less."""
        count, best = max(wanted, 1), self.words(1)
        nearest = length_of(best)
        empty = nearest - 1
        for _ in range(TRIES):
            text = self.words(count)
            length = length_of(text)
            if nearest < length <= wanted or nearest > wanted > length:
                nearest, best = length, text
            if length == wanted:
                break
            new = round(count * max(wanted - empty, 1) / max(length - empty, 1))
            count = max(1, new if new != count else count + (1 if wanted > length else -1))
        return best

    def length(self, prompt: str, answer: str | None = None) -> int:
        """Tokens of the turns as they are rendered; without an answer, of what stands before one."""
        if not self.tokenizer.chat_template:
            return len(self.tokenizer(prompt + (answer or ""))["input_ids"])
        turns = [{"role": "user", "content": prompt}]
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pair(self, prompt_tokens: int, chosen: int, rejected: int) -> dict[str, str]:
        """A row of a prompt and two completions."""
        prompt = self.fitted(self.length, prompt_tokens)
        sides = [self.fitted(lambda text: self.length(prompt, text), prompt_tokens + n) for n in (chosen, rejected)]
        return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}

    def counted(self, row: dict[str, str]) -> dict[str, int]:
        """Tokens of a pair."""
        prompt = self.length(row["prompt"])
        return {"prompt": prompt} | {k: self.length(row["prompt"], row[k]) - prompt for k in ("chosen", "rejected")}


def as_sft(row: dict[str, str]) -> dict[str, str]:
    """The prompt and its chosen completion."""
    return {"prompt": row["prompt"], "completion": row["chosen"]}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="")
    parser.add_argument("--mixed", choices=("short", "long"))
    parser.add_argument("--rows", type=int, default=16)
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    writer, lengths = Writer(a.model), {}
    for tokens in (int(word) for word in a.tokens.split(",") if word):
        brief = max(tokens // 10, 32)
        one = [writer.pair(brief, tokens - brief, 1) for _ in range(a.rows)]
        two = [writer.pair(tokens // 2, tokens // 2, tokens // 2) for _ in range(a.rows)]
        write(a.folder / f"sft-{tokens}.jsonl", [as_sft(row) for row in one])
        write(a.folder / f"dpo-{tokens}.jsonl", two)
        write(a.folder / f"prompts-{tokens}.jsonl", [{"prompt": row["prompt"]} for row in two])
        lengths[str(tokens)] = {"sft": writer.counted(one[0]), "dpo": writer.counted(two[0])}
    if a.mixed:
        told = json.loads((HERE / f"lengths/{a.mixed}.json").read_text(encoding="utf-8"))
        made = list(zip(told["prompt"], told["chosen"], told["rejected"], strict=True))[: a.rows]
        rows = [writer.pair(*sizes) for sizes in made]
        write(a.folder / "mixed.jsonl", rows)
        write(a.folder / "mixed-sft.jsonl", [as_sft(row) for row in rows])
        found = [writer.counted(row) for row in rows[:50]]
        lengths[a.mixed] = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
    (a.folder / "lengths.json").write_text(json.dumps(lengths) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
