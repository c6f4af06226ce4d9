# SPDX-License-Identifier: Apache-2.0
"""What is timed: the cases, the settings every contestant trains with, and the arithmetic a step needs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BATCH, RANK, ALPHA, LEARNING_RATE, MAX_LENGTH = 4, 8, 16, 1e-4, 512
WARM_UP_STEPS = 2  # left out of every median: shapes are compiled and memory is first touched


@dataclass(frozen=True)
class Case:
    """One row of the table: the same job for every contestant, each with its best setting for the goal."""

    method: Literal["dpo", "sft", "orpo", "cpo"]
    goal: Literal["speed", "memory", "epoch"]  # epoch: one pass over all rows, process start to end
    reference: Literal["cached", "live"] | None = None
    about: str = ""
    rejected: int = 1  # completions of a prompt beside the chosen one; several: no peer reads them, run.py times us
    nll_on_prompt: bool = False  # ORPO's likelihood covers the prompt as well

    @property
    def rows_file(self) -> str:
        """Path below the data folder."""
        folder = "sft" if self.method == "sft" else "dpo" if self.rejected == 1 else f"dpo-rejected{self.rejected}"
        return f"{folder}/{'train' if self.goal == 'epoch' else 'steps'}.jsonl"


CASES = {
    "dpo-cached": Case("dpo", "speed", "cached", "DPO, reference log-probs computed before the first step"),
    "dpo-live": Case("dpo", "speed", "live", "DPO, reference computed in every step"),
    "dpo-checkpointed": Case("dpo", "memory", "cached", "DPO, gradient checkpointing"),
    "dpo-rejected3": Case("dpo", "speed", "cached", "DPO, 3 rejected completions a prompt", rejected=3),
    "orpo": Case("orpo", "speed", None, "ORPO"),
    "orpo-prompt": Case("orpo", "speed", None, "ORPO, likelihood of prompt and chosen", nll_on_prompt=True),
    "orpo-checkpointed": Case("orpo", "memory", None, "ORPO, gradient checkpointing"),
    "cpo": Case("cpo", "speed", None, "CPO"),
    "cpo-checkpointed": Case("cpo", "memory", None, "CPO, gradient checkpointing"),
    "sft": Case("sft", "speed", None, "SFT, loss on the completion"),
    "sft-checkpointed": Case("sft", "memory", None, "SFT, gradient checkpointing"),
    "dpo-cold": Case("dpo", "epoch", "cached", "DPO, 128 pairs from process start to end, reference included"),
}


def lengths(data: Path) -> dict[str, int]:
    """Tokens of prompt, chosen and rejected of every row, as `make_pairs.py` counted them."""
    return json.loads((data / "lengths.json").read_text())


def flops_per_step(model: Path, case: Case, data: Path) -> float:
    """Floating-point operations that one step of the case needs: what no exact method can leave out.

    A prompt is computed once for all its completions, logits at trained positions only, nothing twice. With
    N = weights of the linear layers, T = tokens of the batch, r = rank, K = trained tokens, V = vocabulary, D = width,
    P = pairs (query, key) with key <= query, H = width of all heads, L = layers:
      linear     4 N T          2 forward, 2 for the gradient of the input; a frozen weight needs no gradient
      LoRA       6 r T sum(in + out)
      head       4 V D K
      attention  12 H P L       4 forward (scores, values), 8 backward
    and 2 N T + 2 V D K + 4 H P L more where the reference is computed in the step. A contestant that recomputes the
    prompt for each completion is divided by the same number, so its share of the peak says what that costs it.
    """
    config = json.loads((model / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_width = config.get("head_dim") or width // config["num_attention_heads"]
    heads = head_width * config["num_attention_heads"]
    shared = head_width * config["num_key_value_heads"]
    shapes = [(width, heads), (width, shared), (width, shared), (heads, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    linear = layers * sum(a * b for a, b in shapes)
    row = lengths(data)
    prompt = row["prompt"] - 1  # its last token is the first input of every completion
    completions = [row["chosen"]] + [row["rejected"]] * (0 if case.method == "sft" else case.rejected)
    tokens, trained = BATCH * (prompt + sum(completions)), BATCH * sum(completions)
    trained += BATCH * prompt * case.nll_on_prompt  # every token of a prompt but its first is predicted
    seen = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in completions)
    head, attention = config["vocab_size"] * width * trained, heads * BATCH * seen * layers
    total = 4 * linear * tokens + 4 * head + 12 * attention
    total += 6 * RANK * tokens * layers * sum(a + b for a, b in shapes)
    if case.reference == "live":
        total += 2 * linear * tokens + 2 * head + 4 * attention
    return float(total)
