# SPDX-License-Identifier: Apache-2.0
"""Count the shapes that a run on a GPU compiles, and what they cost in padding, over committed lengths of rows.

    python benchmarks/shapes.py [--batch-size 4]

lengths/short.json and lengths/long.json: 1,750 rows, log-normal with sigma 0.8, medians of 25 (600) tokens of prompt
and 16 of each completion. sft takes the prompt and the first completion. grpo: prompts of 89 tokens, 8 completions
of 64. Nothing is computed: `mlx-realign train --dry-run --plan-for metal` tells the same about a file of rows.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_realign import layout
from mlx_realign.batch import Completion, Example

HERE = Path(__file__).parent / "lengths"


def rows(name: str, completions: int) -> list[Example]:
    """Rows of the lengths in a file, without text."""
    told = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    sides = [told["chosen"], told["rejected"]][:completions]
    return [_row(prompt, own) for prompt, *own in zip(told["prompt"], *sides, strict=True)]


def _row(prompt: int, own: Sequence[int]) -> Example:
    made = tuple(Completion(np.zeros(n, np.int32), np.ones(n, bool)) for n in own)
    return Example(np.zeros(prompt, np.int32), made, 0, "", {})


def batches(found: Sequence[Example], size: int) -> list[np.ndarray]:
    """Micro-batches as `data.plan` makes them of shuffled rows."""
    lengths = np.array([len(e.prompt) + max(len(c.tokens) for c in e.completions) for e in found])
    order = np.random.default_rng([0, 0]).permutation(len(found))
    order = order[np.lexsort((lengths[order], np.arange(len(found)) // (size * 64)))]
    return np.split(order, range(size, len(found), size))


def measured(found: Sequence[Example], size: int) -> dict[str, float]:
    """Shares of one epoch."""
    plan = batches(found, size)
    made = layout.of_rows(found, lambda _: plan, 1)  # pyright: ignore[reportArgumentType]
    for places in plan:
        for part in made.parts([found[int(i)] for i in places]):
            made.note(made.need(part))
    return made.shares()


def generated() -> dict[str, float]:
    """Shares of groups of grpo."""
    made = layout.of_rollouts(np.full(64, 89), 8, 64)
    made.note(made.need([_row(89, [64] * 8)]))
    return made.shares()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    size = parser.parse_args().batch_size
    found: dict[str, Any] = {f"sft, {name}": measured(rows(name, 1), size) for name in ("short", "long")}
    found |= {f"pairs, {name}": measured(rows(name, 2), size) for name in ("short", "long")}
    found["grpo, 89 tokens, 8 x 64"] = generated()
    print("| rows | shapes | compiled | padding | computed again |\n|---|---|---|---|---|")
    for name, told in found.items():
        shares = [f"{told[key]:.1%}" for key in ("compiled_share", "padding_share", "recomputed_share")]
        print(f"| {name} | {told['shapes']} | {' | '.join(shares)} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
