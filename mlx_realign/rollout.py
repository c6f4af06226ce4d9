# SPDX-License-Identifier: Apache-2.0
"""Prompts -> completions of the policy as it stands, many at a time, with the log-probs they were sampled with.

The adapter in training is used directly. Each prompt is computed once for all its completions; rows that end leave the
batch and waiting prompts take their place, or begin together where a model's caches allow no more (see `ways`).
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import data, taps, ways
from .decoding import Decoder, Row
from .errors import UserError
from .policy import Policy
from .sampling import Sampling, numbers
from .stepping import Stepper
from .workers import known_thread

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
    """group_size completions of each prompt (token ids); at most `rows` of them are made at a time, both at least 1.

    UserError for a token that the model has no row for, and for a text longer than its table of positions.
    The same seed gives the same text again; a completion's random numbers belong to its place (prompt, member).
    variants: for each prompt the configuration that taps on the model (steering, say) apply to it.
    UserError for an empty prompt, a variant that is not there and numbers out of range.
    """
    _check(policy, prompts, variants, group_size=group_size, rows=rows)
    known_thread()
    policy.reach.refuse(prompts, policy.tokenizer, new=sampling.max_new_tokens)
    way = ways.check(policy)[0]
    policy.notes += [note for note in ways.notes(policy) if note not in policy.notes]
    most = rows if way in ways.TOGETHER else 1
    decoder = ways.decoder(policy, way, sampling)
    groups: list[list[Row]] = []  # one larger than the batch in pieces
    for i, prompt in enumerate(prompts):
        for start in range(0, group_size, most):
            members, ids = range(start, min(start + most, group_size)), np.array(prompt, np.int32)
            variant = variants[i] if variants else 0
            draw = [numbers((seed, i, member), sampling.max_new_tokens) for member in members]
            both = zip(draw, members, strict=True)
            groups.append([Row(ids, len(groups), drawn, (i, member), variant) for drawn, member in both])
    if not decoder.joins:  # then rows that begin together are the more alike
        groups.sort(key=lambda group: len(group[0].prompt))
    found = _made(policy, decoder, deque(groups), sampling, most)
    return [[found[i, member] for member in range(group_size)] for i in range(len(prompts))]


def _check(policy: Policy, prompts: Sequence[Any], variants: Sequence[int] | None, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"rollout: {name} must be at least 1, got {count}.")
    for i, prompt in enumerate(prompts):
        refuse_empty(prompt, f"rollout: prompts[{i}]")
    if variants is not None and len(variants) != len(prompts):
        raise UserError(f"{len(variants)} variants for {len(prompts)} prompts: give one for each.")
    count = taps.variants(policy.model)
    if count and (beyond := [one for one in variants or () if not 0 <= one < count]):
        raise UserError(f"there is no variant {beyond[0]}: there are {count}, from 0.")


def refuse_empty(prompt: Sequence[int] | np.ndarray, name: str) -> None:
    """UserError for a prompt without tokens: there is nothing that a model could go on from."""
    if not len(prompt):
        raise UserError(f"{name} is empty: give at least one token, the tokenizer's first of a text say.")


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
    batch_size: how many are made at a time. UserError for numbers out of range and a prompt that gives no token.
    """
    if batch_size < 1:
        raise UserError(f"complete: batch_size must be at least 1, got {batch_size}.")
    asked = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    chosen = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    tokens = [data.encode_prompt(prompt, policy.tokenizer) for prompt in prompts]
    return [group[0].text for group in rollout(policy, tokens, asked, seed=chosen, rows=batch_size)]


def _made(
    policy: Policy,
    decoder: Decoder | Stepper,
    waiting: deque[list[Row]],
    sampling: Sampling,
    rows: int,
) -> dict[tuple[int, int], Generated]:
    """The completion of every row, by its tag; waiting: groups of rows, at most `rows` in each."""
    ends, found = _ends(policy), {}
    while waiting or not all(row.done for row in decoder.rows):
        live = [row for row in decoder.rows if not row.done]
        done = len(decoder.rows) - len(live)
        if not live or done * LEAVE >= len(decoder.rows):
            new: list[Row] = [] if live else waiting.popleft()
            while waiting and len(live) + len(new) + len(waiting[0]) <= rows:
                if not decoder.admits(waiting[0][0], live, new):
                    break
                new += waiting.popleft()
            if done or new:
                decoder.exchange(live, new)
        decoder.step()
        for row in decoder.rows:
            if not row.done and row.tokens and (ended := _ended(policy, row, ends, sampling)):
                row.done, found[row.tag] = True, ended
    return found


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
