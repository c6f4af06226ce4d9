# SPDX-License-Identifier: Apache-2.0
"""Prompts -> completions of the policy as it stands, many at a time."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from . import blas, data
from .policy import Policy
from .workers import cores

SMALL = 20e6  # parameters; the matrices of a smaller model are multiplied three times faster by one thread than by two


def complete(
    policy: Policy,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
    batch_size: int = 64,
) -> list[str]:
    """One completion text per prompt (a user message or a list of messages), without its end-of-turn token.

    temperature 0 takes the most likely token; above it, tokens are sampled, repeatably where a seed is given.
    """
    tokenizer = policy.tokenizer
    if seed is not None:
        mx.random.seed(seed)
    blas.set_threads(1 if policy.parameters < SMALL else cores())
    stops = tokenizer.eos_token_ids | data.stop_ids(tokenizer)
    generator = BatchGenerator(
        policy.model,
        max_tokens=max_new_tokens,
        stop_tokens=[[token] for token in stops],
        sampler=make_sampler(temperature),
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    ids = generator.insert([data.encode_prompt(prompt, tokenizer) for prompt in prompts])
    found: dict[int, list[int]] = {i: [] for i in ids}
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                found[response.uid].append(response.token)
    generator.close()
    blas.set_threads(cores())
    return [tokenizer.decode(found[i]) for i in ids]
