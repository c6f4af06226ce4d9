# SPDX-License-Identifier: Apache-2.0
"""Model types that mlx-lm has and that cannot be used, here or at all, and what their users are told.

What raises is refused by what it raises, and let in on the day it does not; only the line is written here. What runs
and gives something else than it should is refused by its name.
"""

WRONG = {  # by model type: refused before the weights are read
    "gemma3n": "Gemma 3n is not supported: in mlx-lm its upper layers give something else without a cache than with "
    "one, and training and measuring run without. Use Gemma 3 or Gemma 4",
    "phi3small": "Phi-3-small is not supported: in mlx-lm its tokens see those that come after them, so that neither "
    "its log-probs nor what it generates are right. Use Phi-3-mini, Phi-3-medium or Phi-4",
}
RAISING = [  # (model type or None for all, what the error says, the words that stand before it)
    (
        "deepseek_v41",
        "Cannot calculate VJP",
        "MLX has no gradient for the indexer in mlx-lm's model file. It can generate; to train, take DeepSeek V3",
    ),
    (
        "gear",
        "layer_types",
        "transformers, which reads tokenizers by config.json, does not take its layer_types, so that mlx-lm alone "
        "cannot load it either. Take another model",
    ),
    (
        "olmo",
        "ai2-olmo",
        "mlx-lm's model file of the first OLMo wants a package. Install it, or take OLMo 2 or OLMo 3, which want none",
    ),
    (
        "recurrent_gemma",
        "_no_grad",
        "mlx-lm's model file of RecurrentGemma does not work with this MLX. Take Gemma 3 or Gemma 4",
    ),
    (
        None,
        "No Metal back-end",
        "mlx-lm computes them by a kernel for Apple GPUs, and there is none here. Take a Mac, or another model",
    ),
    (
        None,
        "Failed to compile function",
        "MLX compiles functions with the system's C++ compiler, and that failed. Install g++ or clang++, and see that "
        "the temporary folder (TMPDIR) has room",
    ),
]


def explained(kind: object, reason: str) -> str:
    """Why a model of type `kind` is refused: in words, and the error behind them, where it is known; else the error."""
    for one, part, words in RAISING:
        if one in (None, kind) and part in reason:
            return f"{words} ({reason})"
    return reason
