# SPDX-License-Identifier: Apache-2.0
"""How far a model's tables reach: a token or a position beyond them is foreign memory, which MLX reads without a word.

Ids and lengths are checked where they are numbers of Python or NumPy, before they become arrays.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .errors import UserError

PROBE = (3, 1, 2)  # tokens; positions rise
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


class Reach(NamedTuple):
    """Limits of a model; None: not known, or none."""

    ids: int | None = None  # tokens below it have a row in the embedding and a logit
    positions: int | None = None  # tokens of the longest text, where positions are read from a table
    stated: int | None = None  # max_position_embeddings: a longer text is computed, and not what the model was made for

    def fault(self, ids: np.ndarray, tokenizer: Any) -> str | None:
        """What is wrong with these token ids (any shape), in a sentence; None where nothing is."""
        if self.ids is None or not ids.size or 0 <= int(ids.min()) <= int(ids.max()) < self.ids:
            return None
        token = int(ids.max()) if int(ids.max()) >= self.ids else int(ids.min())
        text = f" ({_text(token, tokenizer)!r})" if token >= 0 else ""
        return (
            f"token {token}{text} is outside of the model's embedding, which has {self.ids} rows: take the tokenizer "
            "that the weights came with, or resize the embedding"
        )

    def too_long(self, tokens: int) -> str | None:
        """What is wrong with a text of so many tokens; None where it fits the table of positions."""
        if self.positions is None or tokens <= self.positions:
            return None
        return f"{tokens} tokens, and the model's table of positions has {self.positions} rows"

    def refuse(self, texts: Sequence[Any], tokenizer: Any, what: str = "prompt", new: int = 0) -> None:
        """UserError for the first text (token ids) that goes beyond, with `new` tokens to come; `what` names a text."""
        for i, text in enumerate(texts):
            wrong = self.fault(np.asarray(text), tokenizer)
            if wrong is None and (wrong := self.too_long(len(text) + new)):
                wrong = f"{wrong}. Shorten it{', or lower --max-new-tokens' if new else ''}"
                wrong = f"{len(text)} tokens and {new} new ones are {wrong}" if new else wrong
            if wrong:
                raise UserError(f"{what} {i + 1}: {wrong}.")

    def refuse_arrays(self, what: str, arrays: Sequence[Any], tokenizer: Any) -> None:
        """UserError for token ids int32 (any shape), made of NumPy's numbers, so that nothing is computed for this."""
        for ids in arrays:
            if wrong := self.fault(np.array(ids), tokenizer):
                raise UserError(f"{what}: {wrong}.")

    def note(self, longest: int) -> str | None:
        """One line where a text is longer than what the model says it was made for."""
        if self.stated is None or longest <= self.stated:
            return None
        return f"the longest text has {longest} tokens; the model was made for {self.stated} (max_position_embeddings)"


def of_config(config: dict[str, Any]) -> Reach:
    """As the config of a model says; for where its weights are not read."""
    told = config | (text if isinstance(text := config.get("text_config"), dict) else {})
    rows = [told[key] for key in ("embedding_size", "vocab_size") if isinstance(told.get(key), int)]
    return Reach(max(rows, default=None), None, _stated(told))


def find(model: nn.Module, config: dict[str, Any], vocabulary: int) -> Reach:
    """Of a model as it runs: its tables are those that a short text reaches. vocabulary: number of its logits.

    Tables of positions are made to end at their last row: the padding of a batch may go beyond.
    """
    tables = [module for _, module in model.named_modules() if isinstance(module, EMBEDDING)]
    ids, positions = [vocabulary], []
    for table, asked in _asked(model, tables):
        if asked == PROBE:
            ids.append(table.weight.shape[0])
        elif len(asked) == len(PROBE) and asked == tuple(range(asked[0], asked[0] + len(PROBE))):
            positions.append(table.weight.shape[0] - asked[0])
            if not hasattr(type(table), "ends"):
                table.__class__ = _ending(type(table))
    told = of_config(config).stated
    return Reach(min(ids), min(positions, default=None), None if positions else told)


def _asked(model: nn.Module, tables: list[Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """(table, indices it was asked for) when the model reads the probe."""
    heard: list[tuple[Any, mx.array]] = []
    kinds = [type(table) for table in tables]
    for table, kind in zip(tables, kinds, strict=True):
        table.__class__ = type(kind.__name__, (kind,), {"__call__": _hearing(kind, heard)})
    try:
        model(mx.array([PROBE]))
    finally:
        for table, kind in zip(tables, kinds, strict=True):
            table.__class__ = kind
    whole = [(table, x) for table, x in heard if mx.issubdtype(x.dtype, mx.integer)]
    return [(table, tuple(np.array(x).reshape(-1).tolist())) for table, x in whole]


def _hearing(kind: type, heard: list[tuple[Any, mx.array]]) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        heard.append((self, x))
        return kind.__call__(self, x)

    return call


def _ending(kind: type) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        return kind.__call__(self, mx.clip(x, 0, self.weight.shape[0] - 1))

    return type(kind.__name__, (kind,), {"ends": True, "__call__": call})


def _stated(config: dict[str, Any]) -> int | None:
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def _text(token: int, tokenizer: Any) -> str:
    """A token as the tokenizer writes it, or "" where it has no such token either."""
    try:
        return str(tokenizer.convert_ids_to_tokens([token])[0] or "")
    except Exception:  # tokenizers raise what they like for ids that they do not have
        return ""
