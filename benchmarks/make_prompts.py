# SPDX-License-Identifier: Apache-2.0
"""Make what `grpo.py` and `rollouts.py` are timed on: prompts, and a model that never ends a completion.

    python benchmarks/make_prompts.py MODEL FOLDER [--prompt-tokens 89]

Prompts are those of `make_pairs.py`, in FOLDER: `prompts.jsonl` for training, equally long (89 tokens with SmolLM2's
template), `mixed.jsonl` of four lengths (40 to 89), `long.jsonl` of about 200 tokens. FOLDER/model is MODEL with the
rows of its end tokens in the output matrix set to 0. Their logit is 0 then, which is too little to be sampled (once in
30 million tokens of SmolLM2-135M): every contestant generates as many tokens as it may, without a setting of its own.
FOLDER/lengths.json has the prompts' tokens, the end tokens, and the name of MODEL.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import make_pairs
import mlx.core as mx
from mlx_lm.utils import load_config, load_tokenizer

from mlx_realign import data

TRAINING, TIMED = 32, 4  # prompts in prompts.jsonl, and in the files that rollouts are timed on
LONG = 200


def prompts(model: str, prompt_tokens: int | None = None) -> dict[str, list[str]]:
    """File name without its ending -> prompts."""
    sentences = make_pairs.sentences_for(prompt_tokens, model) if prompt_tokens else make_pairs.SENTENCES
    lengths = enumerate((0, 0, 1, make_pairs.SENTENCES))
    mixed = [make_pairs.pairs(TIMED, sentences=n)[i]["prompt"] for i, n in lengths]
    mixed[0] = mixed[0].rpartition(". ")[2]  # the question alone
    long = make_pairs.pairs(TIMED, sentences=make_pairs.sentences_for(LONG, model))
    return {
        "prompts": [row["prompt"] for row in make_pairs.pairs(TRAINING, sentences=sentences)],
        "mixed": mixed,
        "long": [row["prompt"] for row in long],
    }


def endless(model: Path, folder: Path) -> list[int]:
    """Copy a model folder with the logits of its end tokens made 0; returns these tokens.

    ValueError unless there is one output matrix, of floats.
    """
    config = load_config(model)
    ends = sorted(data.stop_ids(load_tokenizer(model, eos_token_ids=config.get("eos_token_id"))))
    tied = config.get("tie_word_embeddings", False)
    name = "embed_tokens.weight" if tied else "lm_head.weight"
    folder.mkdir(parents=True, exist_ok=True)
    changed = 0
    for source in model.iterdir():
        if source.suffix != ".safetensors":
            shutil.copy(source, folder)
            continue
        loaded: Any = mx.load(str(source), return_metadata=True)
        weights, metadata = loaded
        for key, value in weights.items():
            if key.endswith(name) and mx.issubdtype(value.dtype, mx.floating):
                value[mx.array(ends)] = 0
                changed += 1
        mx.save_safetensors(str(folder / source.name), weights, metadata)
    if changed != 1:
        raise ValueError(f"{model}: expected one matrix *{name} of floats, found {changed}")
    return ends


def write(folder: Path, model: Path, prompt_tokens: int | None = None) -> dict[str, Any]:
    """Write all files; returns what lengths.json has."""
    tokenizer = load_tokenizer(model)
    found: dict[str, Any] = {"model": model.name, "end_tokens": endless(model, folder / "model")}
    for name, texts in prompts(str(model), prompt_tokens).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        found[name] = sorted({len(data.encode_prompt(text, tokenizer)) for text in texts})
    (folder / "lengths.json").write_text(json.dumps(found) + "\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, help="about so many tokens of a prompt that is trained on")
    arguments = parser.parse_args()
    print(json.dumps(write(arguments.folder, arguments.model.absolute(), arguments.prompt_tokens)))
