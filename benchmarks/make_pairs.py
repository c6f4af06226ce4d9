# SPDX-License-Identifier: Apache-2.0
"""Make the rows that benchmarks are timed on: equal lengths, so that no contestant gains or loses by its padding.

    python benchmarks/make_pairs.py MODEL FOLDER [--prompt-tokens 256]

128 sums as pairs (prompt, chosen, rejected), for every method of preference, as pairs with three rejected, and as
completions, in FOLDER/dpo, FOLDER/dpo-rejected3 and FOLDER/sft: `train.jsonl` with all rows and `steps.jsonl` with the
first 32. With SmolLM2's template a prompt has 89 tokens, its system turn and generation prompt included, and the
completions have 33 and 21, end-of-turn included (some contestants train the line feed that the template puts after it
as well). Longer prompts repeat a sentence, as often as brings them nearest to --prompt-tokens. FOLDER/lengths.json has
the lengths with the tokenizer of MODEL.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

ROWS, STEP_ROWS = 128, 32
SENTENCES = 3  # at the start of a prompt, where its length is not asked for
OFF = (3, -3, -5)  # what is wrong with the rejected sums


def pairs(count: int = ROWS, seed: int = 0, *, rejected: int = 1, sentences: int = SENTENCES) -> list[dict[str, Any]]:
    """Distinct sums of two two-digit numbers below 97: every digit is one token, so all rows are equally long."""
    sums = [(a, b) for a in range(10, 87) for b in range(10, 97 - a)]
    return [_pair(a, b, rejected, sentences) for a, b in random.Random(seed).sample(sums, count)]


def _pair(a: int, b: int, rejected: int, sentences: int) -> dict[str, Any]:
    context = "Here is some context about arithmetic that is long enough to matter. " * sentences
    steps = "Let me know if you would like to see the steps in a bit more detail."
    wrong = [f"I do not know, maybe {a + b + n}. Use a calculator or ask someone else about it." for n in OFF]
    return {
        "prompt": f"{context}Here is context that is long enough to matter. What is {a} plus {b}?",
        "chosen": f"The sum of {a} and {b} is {a + b}. {steps}",
        "rejected": wrong[0] if rejected == 1 else wrong[:rejected],
    }


def write(folder: Path, model: str, prompt_tokens: int | None = None) -> dict[str, int]:
    """Write the files; returns the token lengths of a row. ValueError where rows are not equally long."""
    sentences = sentences_for(prompt_tokens, model) if prompt_tokens else SENTENCES
    rows, several = pairs(sentences=sentences), pairs(rejected=3, sentences=sentences)
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for name, content in (("dpo", rows), ("dpo-rejected3", several), ("sft", completions)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in content]
        (folder / name / "train.jsonl").write_text("".join(lines))
        (folder / name / "steps.jsonl").write_text("".join(lines[:STEP_ROWS]))
    found = token_lengths(several, model)
    (folder / "lengths.json").write_text(json.dumps(found) + "\n")
    return found


def sentences_for(prompt_tokens: int, model: str) -> int:
    """How often the sentence stands in a prompt of about so many tokens."""
    short, longer = (token_lengths(pairs(1, sentences=n), model)["prompt"] for n in (SENTENCES, SENTENCES + 1))
    return max(0, SENTENCES + round((prompt_tokens - short) / (longer - short)))


def token_lengths(rows: list[dict[str, Any]], model: str) -> dict[str, int]:
    """Tokens of prompt, chosen and rejected, which must be the same in every row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokens(*messages: tuple[str, str], start: bool = False) -> list[int]:
        turns = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=start, return_dict=False)

    found = set()
    for row in rows:
        user = ("user", row["prompt"])
        prompt = len(tokens(user, start=True))
        rejected = [row["rejected"]] if isinstance(row["rejected"], str) else row["rejected"]
        ends = [tokens(user, ("assistant", text)) for text in (row["chosen"], *rejected)]
        chosen, *others = (max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id) for ids in ends)
        found |= {(prompt, chosen + 1 - prompt, other + 1 - prompt) for other in others}
    if len(found) != 1:
        raise ValueError(f"rows differ in length with the tokenizer of {model}: {sorted(found)}")
    return dict(zip(("prompt", "chosen", "rejected"), found.pop(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, help="about so many tokens a prompt")
    arguments = parser.parse_args()
    print(json.dumps(write(arguments.folder, arguments.model, arguments.prompt_tokens)))
