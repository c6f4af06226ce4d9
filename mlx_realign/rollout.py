# SPDX-License-Identifier: Apache-2.0
"""Prompts -> completions of the policy as it stands, many at a time, with the log-probs they were sampled with.

The adapter in training is used directly. Each prompt is computed once for all its completions; rows that end leave the
batch and waiting prompts take their place.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from . import blas, data, taps
from .decoding import Decoder, Row
from .errors import UserError
from .policy import Policy
from .sampling import Sampling, numbers
from .workers import cores

SMALL = 20e6  # parameters; the matrices of a smaller model are multiplied three times faster by one thread than by two
LEAVE = 8  # rows go when at least one in so many is done: each time the keys and values of the others are copied


class Generated(NamedTuple):
    """One completion."""

    tokens: np.ndarray  # int32 [L], its end token included where it ended by itself
    logps: np.ndarray  # float32 [L], nats: what the policy said of each token at the sampling temperature
    finished: bool  # False where max_new_tokens cut it
    text: str  # without the end token, or what follows a stop string


def rollout(
    policy: Policy,
    prompts: Sequence[np.ndarray | list[int]],
    sampling: Sampling,
    *,
    group_size: int = 1,
    seed: int = 0,
    rows: int = 64,
    variants: Sequence[int] | None = None,
) -> list[list[Generated]]:
    """group_size completions of each prompt (token ids, not empty); at most `rows` of them are made at a time.

    The same seed gives the same text again; a completion's random numbers belong to its place (prompt, member).
    variants: for each prompt the configuration that taps on the model (steering, say) apply to it.
    """
    blas.set_threads(1 if policy.parameters < SMALL else cores())
    _check(policy, prompts, variants)
    try:
        asked = policy, [np.array(p, np.int32) for p in prompts], sampling, group_size, seed
        if policy.sharing:
            return _shared(*asked, rows, variants or [0] * len(prompts))
        if variants and any(variants):
            raise UserError(f"--model {policy.name}: its prompts cannot be shared, so rows of a batch cannot differ")
        try:
            return _alone(*asked, rows)
        except ValueError:  # a model that takes no batch of unequal prompts, gemma2 for one
            return _alone(*asked, 1)
    finally:
        blas.set_threads(cores())


def _check(policy: Policy, prompts: Sequence[Any], variants: Sequence[int] | None) -> None:
    if variants is not None and len(variants) != len(prompts):
        raise UserError(f"{len(variants)} variants for {len(prompts)} prompts: give one for each.")
    count = taps.variants(policy.model)
    if count and (beyond := [one for one in variants or () if not 0 <= one < count]):
        raise UserError(f"there is no variant {beyond[0]}: there are {count}, from 0.")


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
    asked = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    chosen = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    tokens = [data.encode_prompt(prompt, policy.tokenizer) for prompt in prompts]
    return [group[0].text for group in rollout(policy, tokens, asked, seed=chosen, rows=batch_size)]


def _shared(
    policy: Policy,
    prompts: list[np.ndarray],
    sampling: Sampling,
    group_size: int,
    seed: int,
    rows: int,
    variants: Sequence[int],
) -> list[list[Generated]]:
    ends, decoder = _ends(policy), Decoder(policy, sampling)
    waiting: deque[list[Row]] = deque()  # a group at a time; one larger than the batch in pieces
    for i, prompt in enumerate(prompts):
        for start in range(0, group_size, rows):
            members = range(start, min(start + rows, group_size))
            draw = lambda member, i=i: numbers((seed, i, member), sampling.max_new_tokens)  # noqa: E731
            waiting.append([Row(prompt, len(waiting), draw(m), (i, m), variants[i]) for m in members])
    found: dict[tuple[int, int], Generated] = {}
    while waiting or not all(row.done for row in decoder.rows):
        live = [row for row in decoder.rows if not row.done]
        done = len(decoder.rows) - len(live)
        if not live or done * LEAVE >= len(decoder.rows):
            new: list[Row] = []
            while waiting and (not live and not new or len(live) + len(new) + len(waiting[0]) <= rows):
                new += waiting.popleft()
            if done or new:
                decoder.exchange(live, new)
        decoder.step()
        for row in decoder.rows:
            if not row.done and (ended := _ended(policy, row, ends, sampling)):
                row.done, found[row.tag] = True, ended
    return [[found[i, member] for member in range(group_size)] for i in range(len(prompts))]


def _ended(policy: Policy, row: Row, ends: set[int], sampling: Sampling) -> Generated | None:
    """The completion, where it is one now."""
    finished = row.tokens[-1] in ends
    full = len(row.tokens) >= sampling.max_new_tokens
    if not (finished or full or sampling.stop):
        return None
    text: str = policy.tokenizer.decode(row.tokens[:-1] if finished else row.tokens)
    at = min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=-1)
    if not (finished or full or at >= 0):
        return None
    text = text[:at] if at >= 0 else text
    tokens, logps = np.array(row.tokens, np.int32), np.array(row.logps, np.float32)
    return Generated(tokens, logps, finished or at >= 0, text)


def _ends(policy: Policy) -> set[int]:
    return set(policy.tokenizer.eos_token_ids) | data.stop_ids(policy.tokenizer)


def _alone(
    policy: Policy, prompts: list[np.ndarray], sampling: Sampling, group_size: int, seed: int, rows: int
) -> list[list[Generated]]:
    """By mlx-lm's own generator, for models whose caches cannot be shared: every row computes its prompt."""
    mx.random.seed(seed)
    options = {"temp": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p, "top_k": sampling.top_k}
    penalty = None if sampling.repetition_penalty == 1 else sampling.repetition_penalty
    generator = BatchGenerator(
        policy.model,
        max_tokens=sampling.max_new_tokens,
        sampler=make_sampler(**options),
        logits_processors=make_logits_processors(repetition_penalty=penalty) if penalty else None,
        completion_batch_size=rows,
        prefill_batch_size=rows,
    )
    ends = _ends(policy)
    asked = [(prompt, i, member) for i, prompt in enumerate(prompts) for member in range(group_size)]
    ids = generator.insert([prompt.tolist() for prompt, _, _ in asked])
    made = {uid: Row(prompt, i, np.zeros(0), (i, member)) for uid, (prompt, i, member) in zip(ids, asked, strict=True)}
    found: dict[tuple[int, int], Generated] = {}
    while responses := generator.next_generated():
        for response in responses:
            row = made[response.uid]
            if row.done:
                continue
            scaled = response.logprobs.astype(mx.float32) / sampling.scale
            row.tokens.append(response.token)
            row.logps.append(float(np.array(scaled[response.token] - mx.logsumexp(scaled))))
            if ended := _ended(policy, row, ends, sampling):
                row.done, found[row.tag] = True, ended
                if response.finish_reason is None:
                    generator.remove([response.uid])
    generator.close()
    return [[found[i, member] for member in range(group_size)] for i in range(len(prompts))]
