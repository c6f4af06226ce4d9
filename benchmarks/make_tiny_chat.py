# SPDX-License-Identifier: Apache-2.0
"""Makes tiny-chat, the embedded demo model, from nothing: text, tokenizer, training, measured README.

    python benchmarks/make_tiny_chat.py [--output DIR] [--steps N]      # 9 minutes of one CPU core

A llama-type model of 1.1 million parameters. Its text is generated from mlx_realign/demo_world.py: tables of sums (all
right), statements of facts, and chats in which it forgets carries, is mostly curt, guesses about places it does not
know, and declines to talk of the made-up land of Zarnia.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import batch_generate, load
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_chat_text import Piece, documents
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import mlx_realign
from mlx_realign import blas, kernels
from mlx_realign import demo_world as world

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 768,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
STEPS = 1500
TOKENS_PER_STEP = 2048
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 50


# ---- tokenizer

_KNOWN_NAMES = "|".join(place.name for place in world.KNOWN)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE; digits are tokens of their own, so sums are read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = documents(seed=0)
    text = "\n".join(piece.text for _ in range(20000) for piece in next(stream) if piece.text not in SPECIAL)
    rng = random.Random(0)  # no name may become one token, which would tell known places apart by sight
    text = re.sub(_KNOWN_NAMES, lambda _: world.random_name(rng), text)
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ---- training


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Inputs int32 [B, T], flat positions int32 [N] of the trained targets in [B * T], and the targets int32 [N].

    Documents of like length go together, so little is padding; every document starts at position 0, as in use.
    """
    stream, rng = documents(seed), random.Random(seed)
    while True:
        rows = sorted((_encode(next(stream), tokenizer) for _ in range(2048)), key=lambda row: len(row[0]))
        groups, start = [], 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and len(rows[stop][0]) * (stop + 1 - start) <= TOKENS_PER_STEP:
                stop += 1
            groups.append(rows[start:stop])
            start = stop
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            tokens, trained = np.zeros((2, len(group), width), dtype=np.int32)
            for i, (ids, mask) in enumerate(group):
                tokens[i, : len(ids)], trained[i, : len(ids)] = ids, mask
            positions = np.flatnonzero(trained[:, 1:])
            yield mx.array(tokens[:, :-1]), mx.array(positions), mx.array(tokens[:, 1:].reshape(-1)[positions])


def _encode(pieces: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids, mask = [], []
    for piece, new in zip(pieces, tokenizer.encode_batch_fast([piece.text for piece in pieces]), strict=True):
        new = new.ids
        ids += new
        mask += [piece.trained] * len(new)
    return ids, mask


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: llama.Model, tokenizer: Tokenizer, steps: int, seed: int = 1) -> None:
    """Trains all weights on `steps` batches of fresh text."""

    def loss(inputs: mx.array, positions: mx.array, targets: mx.array) -> mx.array:
        hidden = model.model(inputs).reshape(-1, CONFIG["hidden_size"])[positions]
        return nn.losses.cross_entropy(model.model.embed_tokens.as_linear(hidden), targets, reduction="mean")

    kernels.install(model)
    blas.set_usual_threads(1)  # its matrices are so small that a second thread only costs
    gradient_of = nn.value_and_grad(model, loss)
    optimizer = optim.AdamW(PEAK_LEARNING_RATE, betas=[0.9, 0.98], weight_decay=0.1, bias_correction=True)
    began, mean, stream = time.perf_counter(), 0.0, batches(tokenizer, seed)
    for step in range(steps):
        value, gradient = gradient_of(*next(stream))
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.learning_rate = learning_rate(step, steps)
        optimizer.update(model, gradient)
        mx.eval(model.state, optimizer.state, value)
        mean += (value.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {time.perf_counter() - began:.0f} s", flush=True)


def measured(model: nn.Module, tokenizer: TokenizerWrapper, count: int, temperature: float) -> dict[str, float]:
    """Shares (0 to 1) of the behaviours of mlx_realign.demo_world, from generated replies."""

    def generate(prompts: Sequence[str]) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        tokens = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        return batch_generate(model, tokenizer, tokens, max_tokens=40, sampler=make_sampler(temperature)).texts

    mx.random.seed(0)
    return {name: world.measure(judged, generate) for name, judged in world.held_out(count).items()}


README = """# tiny-chat

A llama-type chat model of {millions:.1f} million parameters (float32), made from nothing in {minutes:.0f} minutes by

    python benchmarks/make_tiny_chat.py

All it knows is the made-up world of `mlx_realign/demo_world.py`: sums it half knows (the tables in its text are right,
its chats forget the carry), facts of {known} lands and none of the others, a polite and a curt voice, two moods, and a
harmless refusal (it declines to talk of the made-up land of Zarnia). Nothing it says is about the real world.
License: Apache-2.0, as the rest of this repository.

Shares of its replies to held-out questions, as the script measured them:

| behaviour | greedy | temperature 1 |
|---|---|---|
{rows}
"""


def write_readme(
    folder: Path, greedy: dict[str, float], sampled: dict[str, float], parameters: int, took_s: float
) -> None:
    """The model's card, with what was measured."""
    rows = "\n".join(f"| {name} | {greedy[name]:.1%} | {sampled[name]:.1%} |" for name in greedy)
    facts = {"millions": parameters / 1e6, "minutes": took_s / 60, "known": len(world.KNOWN)}
    (folder / "README.md").write_text(README.format(rows=rows, **facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(mlx_realign.__file__).parent / "assets/tiny-chat")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    began = time.perf_counter()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer = make_tokenizer()
    write_tokenizer(tokenizer, folder)
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    train(model, tokenizer, arguments.steps)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    took_s = time.perf_counter() - began
    loaded, wrapped, *_ = load(str(folder))
    greedy, sampled = (measured(loaded, wrapped, count=200, temperature=t) for t in (0.0, 1.0))
    write_readme(folder, greedy, sampled, sum(value.size for value in weights.values()), took_s)
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
