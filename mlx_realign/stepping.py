# SPDX-License-Identifier: Apache-2.0
"""One token at a time over mlx-lm's own caches, for models whose prompts cannot be shared: state spaces, hybrids.

Rows that are made together begin together and are always at the same column: no row has padding, which would leak into
a state that sums up all tokens. A prompt is computed once for its group, as far as all prompts of the batch reach; what
longer ones have beyond that is fed while shorter ones are being completed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from . import taps
from .decoding import PREFILL_TOKENS, Row, had
from .policy import Policy
from .sampling import Sampling, pick


class Stepper:
    """As `decoding.Decoder`; a step computes what all rows have and is not computed yet, then those whose prompts have
    ended get a token."""

    joins = False  # whether rows can join those under way

    def __init__(self, policy: Policy, sampling: Sampling, *, cached: bool = True) -> None:
        """cached: whether what was computed is kept; otherwise each step computes the whole text."""
        self.policy, self.sampling, self.cached = policy, sampling, cached
        self.rows: list[Row] = []
        self.caches: list[Any] = []
        self.column = 0  # columns computed
        self.seen: mx.array | None = None

    def admits(self, row: Row, live: Sequence[Row], new: Sequence[Row]) -> bool:
        """Whether a row may begin with `new` ones: feeding what its prompt is longer by must take fewer steps than a
        batch of its own would."""
        return not live and len(row.prompt) - len(new[0].prompt) <= self.sampling.max_new_tokens // 2

    def exchange(self, kept: Sequence[Row], new: Sequence[Row]) -> None:
        """Only `kept` rows stay; where none does, new ones begin."""
        if kept:
            at = mx.array([self.rows.index(row) for row in kept], mx.int32)
            self._take(at)
            self.seen = None if self.seen is None else self.seen[at]
            self.rows = list(kept)
            return
        self.rows, self.column = list(new), 0
        self.caches = make_prompt_cache(self.policy.model) if self.cached else []
        self.seen = had(new, self.policy.vocabulary) if self.sampling.repetition_penalty != 1 else None

    def step(self) -> None:
        """Tokens for the rows whose prompts are computed, at least one, with their log-probs, appended to them."""
        rows = self.rows
        length = min(len(row.prompt) + len(row.tokens) for row in rows)
        speaks = [len(row.prompt) + len(row.tokens) == length for row in rows]
        uniform = [row.uniform[min(len(row.tokens), len(row.uniform) - 1)] for row in rows]
        logits = self.policy.body.logits(self._feed(length))
        tokens, logps = pick(logits, mx.array(np.array(uniform, np.float32)), self.sampling, self.seen)
        if self.seen is not None:
            drawn = mx.array(speaks)[:, None] | mx.take_along_axis(self.seen, tokens[:, None], 1)
            self.seen = mx.put_along_axis(self.seen, tokens[:, None], drawn, 1)
        mx.eval(tokens, logps, self.seen, arrays(self.caches))
        for row, speaking, token, logp in zip(rows, speaks, np.array(tokens), np.array(logps), strict=True):
            if speaking:
                row.tokens.append(int(token))
                row.logps.append(float(logp))

    def _feed(self, length: int) -> mx.array:
        """Hidden states [B, D] that predict column `length` of each row."""
        groups = list(dict.fromkeys(row.group for row in self.rows))
        once = self.column == 0 and len(groups) < len(self.rows)  # so far rows of a group are the same
        fed = [next(row for row in self.rows if row.group == group) for group in groups] if once else self.rows
        text = np.stack([np.concatenate([row.prompt[:length], np.array(row.tokens, np.int32)]) for row in fed])
        at_once = max(1, PREFILL_TOKENS // len(fed)) if self.cached else length
        variant, last_prompt = mx.array([row.variant for row in fed]), mx.array([len(row.prompt) - 1 for row in fed])
        hidden = None
        while self.column < length:
            mx.eval(arrays(self.caches))
            part = text[:, self.column : min(length, self.column + at_once)]
            with taps.tell(variant=variant, last_prompt=last_prompt, start=self.column):
                hidden = self.policy.body.hidden(mx.array(part), self.caches if self.cached else None)
            self.column += part.shape[1]
        assert hidden is not None  # every row has a column that is not computed: its last token
        self.column = length if self.cached else 0
        if not once:
            return hidden[:, -1]
        at = mx.array([groups.index(row.group) for row in self.rows], mx.int32)
        self._take(at, len(fed))
        return hidden[:, -1][at]

    def _take(self, at: mx.array, count: int | None = None) -> None:
        """Rows of all caches, of which there are `count` now."""
        held = len(self.rows) if count is None else count
        mapped(self.caches, lambda x: x[at] if x.ndim and x.shape[0] == held else x)


def mapped(value: Any, change: Callable[[mx.array], mx.array], met: set[int] | None = None) -> Any:
    """What `value` is with every array in it changed: in lists, tuples, dicts and, in place, attributes of objects."""
    met = set() if met is None else met
    if isinstance(value, mx.array):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(x, change, met) for x in value])
    if isinstance(value, dict):
        return {name: mapped(x, change, met) for name, x in value.items()}
    if hasattr(value, "__dict__") and not callable(value) and id(value) not in met:  # modules can be called
        met.add(id(value))
        vars(value).update({name: mapped(x, change, met) for name, x in vars(value).items()})
    return value


def arrays(value: Any) -> list[mx.array]:
    """Every array in it."""
    found: list[mx.array] = []
    mapped(value, lambda x: (found.append(x), x)[1])
    return found
