# SPDX-License-Identifier: Apache-2.0
"""Rows -> examples: templated or raw, cut to max_length by a stated policy, every exception counted."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..batch import Completion, Example
from ..errors import UserError
from ..reach import Reach
from .chat import Pieces, encode_chats, encode_openings, split
from .formats import Row, is_conversation
from .messages import Message, RowError, is_trained
from .tokens import Words, common_prefix, open_text, raw_messages


class TooLong(NamedTuple):
    """A row that does not fit into max_length."""

    tokens: int  # prompt + longest completion
    completion_tokens: int


Outcome = Example | RowError | TooLong


class Encoder:
    """Tokenises rows with one tokenizer and one set of settings; `counts` says what happened on the way."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: bool,
        max_length: int | None,
        truncate: str,
        reach: Reach | None = None,
    ):
        """reach: of the model that shall read the rows; a row that goes beyond is a bad one."""
        self.words = Words(tokenizer)
        self.reach, self.longest = reach or Reach(), 0  # tokens of the longest row
        self.max_length, self.truncate = max_length, truncate
        self.templated = chat_template and self.words.has_template
        self.refuses_chats = chat_template and not self.words.has_template
        self.counts: Counter = Counter()

    def encode(self, rows: Sequence[tuple[int, Row]]) -> list[list[Outcome]]:
        """Tokenise (line, row) pairs, in order; a row is one example, or several where its template rewrites turns.

        UserError where the whole file cannot be used with this tokenizer.
        """
        rows = [(line, self._only_what_is_read(row)) for line, row in rows]
        for _, row in rows:
            if row.skipped:  # Counter.update is slow, and most rows skip nothing
                self.counts.update(row.skipped)
        chats = [i for i, (_, row) in enumerate(rows) if self.templated and not row.text and row.completions]
        found: dict[int, list[Pieces] | RowError] = dict(
            zip(chats, encode_chats([rows[i][1] for i in chats], self.words, self.counts), strict=True)
        )
        alone = [i for i, (_, row) in enumerate(rows) if self.templated and not row.text and not row.completions]
        for i, opened in zip(alone, encode_openings([rows[i][1] for i in alone], self.words), strict=True):
            found[i] = opened if isinstance(opened, RowError) else [opened]
        strings = [i for i, (_, row) in enumerate(rows) if i not in found and not self._is_raw_chat(*rows[i])]
        found.update(zip(strings, ([p] for p in self._encode_strings([rows[i][1] for i in strings])), strict=True))
        for i, (_, row) in enumerate(rows):
            if i not in found:
                found[i] = [self._encode_raw_chat(row)]
        outcomes: list[list[Outcome]] = []
        for i, (line, row) in enumerate(rows):
            parts = found[i]
            outcomes.append([parts] if isinstance(parts, RowError) else [self._finish(line, row, p) for p in parts])
        return outcomes

    def _only_what_is_read(self, row: Row) -> Row:
        """The row without options that the template does not read: what reaches the call is allowed by name."""
        if not (self.templated and row.options) or all(map(self.words.takes, row.options)):
            return row
        self.counts["options_unread"] += 1
        return row._replace(options={key: value for key, value in row.options.items() if self.words.takes(key)})

    def _is_raw_chat(self, line: int, row: Row) -> bool:
        if not is_conversation(row):
            return False
        if self.refuses_chats:
            raise UserError(
                f"line {line}: the row has messages, but the model has no chat template. Use a chat model, or "
                "--no-chat-template to train on raw text plus the end token."
            )
        return True

    def _encode_strings(self, rows: Sequence[Row]) -> list[Pieces]:
        """Raw text: prompt + completion + end token, cut where their tokens stop being the prompt's own."""
        prompts = ["" if row.text else _joined(row) for row in rows]
        texts = [(i, prompts[i] + c) for i, row in enumerate(rows) for c in row.completions if isinstance(c, str)]
        opened = [open_text(e.ids, self.words) for e in self.words.encode(prompts, special=True)]
        parts: list[list[tuple[np.ndarray, np.ndarray, int]]] = [[] for _ in rows]
        for (i, _), e in zip(texts, self.words.encode([text for _, text in texts], special=True), strict=True):
            ids = np.append(open_text(e.ids, self.words), np.int32(self._eos()))
            cut = int(ids[0] == self.words.bos_id) if rows[i].text else common_prefix(opened[i], ids)
            self.counts["seams"] += not rows[i].text and cut < len(opened[i])
            cut = max(cut, 1)
            parts[i].append((ids, np.arange(len(ids)) >= cut, cut))
        return [split(part) if part else Pieces(prompt, ()) for part, prompt in zip(parts, opened, strict=True)]

    def _encode_raw_chat(self, row: Row) -> Pieces:
        """Messages without a template: one per line, an end token after each of the assistant's."""
        self._eos()
        prompt = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        if row.system is not None:
            prompt = [{"role": "system", "content": row.system}, *prompt]
        opened = raw_messages(prompt, self.words)
        parts = []
        for completion in row.completions:
            turns: list[Message] = (
                [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            )
            ids, mask = [opened], [np.zeros(len(opened), bool)]
            for message in turns:
                ids.append(raw_messages([message], self.words, first=False))
                mask.append(np.full(len(ids[-1]), is_trained(message)))
            parts.append((np.concatenate(ids), np.concatenate(mask), len(opened)))
        return split(parts) if parts else Pieces(opened, ())

    def _eos(self) -> int:
        if self.words.eos_id is None:
            raise UserError(
                "the tokenizer has no end token (eos_token), so raw text could never learn to stop. "
                "Set eos_token in tokenizer_config.json."
            )
        return self.words.eos_id

    def _finish(self, line: int, row: Row, pieces: Pieces) -> Outcome:
        longest = max((len(c.tokens) for c in pieces.completions), default=0)
        tokens = len(pieces.prompt) + longest
        if self.max_length is not None and tokens > self.max_length:
            cut = self._cut(pieces, row.text) if self.truncate == "left" else None
            if cut is None:
                return TooLong(tokens, longest)
            self.counts["truncated_rows"] += 1
            self.counts["truncated_tokens"] += tokens - self.max_length
            pieces = cut
        if wrong := self._beyond(pieces):
            return RowError(wrong)
        if any(not c.mask.any() for c in pieces.completions):
            return RowError("no token of the completion is trained")
        if row.group:
            return self._group(line, row, pieces)
        chosen, *others = pieces.completions
        if any(np.array_equal(chosen.tokens, c.tokens) for c in others):
            return RowError("chosen and rejected become the same tokens")
        return Example(pieces.prompt, pieces.completions, line, key_of(*pieces), row.extras)

    def _beyond(self, pieces: Pieces) -> str | None:
        """What of a row the model has no table entry for."""
        texts = [pieces.prompt, *(c.tokens for c in pieces.completions)]
        tokens = len(texts[0]) + max(map(len, texts[1:]), default=0)
        self.longest = max(self.longest, tokens)
        faults = (self.reach.fault(ids, self.words.base) for ids in texts)
        return self.reach.too_long(tokens) or next(filter(None, faults), None)

    def _group(self, line: int, row: Row, pieces: Pieces) -> Outcome:
        """A group keeps one of the completions that become the same tokens (a template may trim them)."""
        scores = row.extras.get("scores", [])
        first: dict[bytes, int] = {}
        for i, completion in enumerate(pieces.completions):
            same = first.setdefault(completion.tokens.tobytes(), i)
            if scores[same] != scores[i]:
                both = f"{scores[same]:g} and {scores[i]:g}"
                return RowError(f"two responses with scores {both} become the same tokens: the row contradicts itself")
        kept = list(first.values())
        self.counts["duplicate_responses"] += len(pieces.completions) - len(kept)
        self.counts["rows_without_responses"] += not pieces.completions
        completions = tuple(pieces.completions[i] for i in kept)
        extras = {**row.extras, "scores": [scores[i] for i in kept]} if kept else row.extras
        return Example(pieces.prompt, completions, line, key_of(pieces.prompt, completions), extras)

    def _cut(self, pieces: Pieces, text: bool) -> Pieces | None:
        """Cut the start until the row fits. BOS stays, completions stay whole; None where that is impossible."""
        limit = self.max_length or 0
        prompt, completions = pieces
        kept = limit - max((len(c.tokens) for c in completions), default=0)
        if kept >= 1:
            return Pieces(self._tail(prompt, kept), completions)
        if len(completions) != 1:
            return None
        # One long conversation: whole turns at its end still fit, the earlier ones become context or go.
        ids = np.concatenate([prompt, completions[0].tokens])
        mask = np.concatenate([np.zeros(len(prompt), bool), completions[0].mask])
        lost = len(ids) - limit + 1  # the first token that is left cannot be trained: nothing stands before it
        if not text:
            starts = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
            starts = starts[starts >= lost]
            if not len(starts):
                return None
            self.counts["turns_cut"] += int((mask[1:] & ~mask[:-1]).sum()) + int(mask[0]) - len(starts)
            lost = int(starts[0])
        first = self._tail(ids[:lost], limit - (len(ids) - lost))
        return Pieces(first, (Completion(ids[lost:], mask[lost:]),))

    def _tail(self, prompt: np.ndarray, kept: int) -> np.ndarray:
        """The last `kept` tokens; a BOS (a token that stands first and nowhere else) stays in front."""
        opens = prompt[0] == self.words.bos_id and (prompt == prompt[0]).sum() == 1
        if opens and 2 <= kept < len(prompt):
            return np.concatenate([prompt[:1], prompt[len(prompt) - kept + 1 :]])
        return prompt[-kept:]


def _joined(row: Row) -> str:
    prompt = str(row.prompt)
    return prompt if row.system is None else f"{row.system}\n{prompt}"


def key_of(prompt: np.ndarray, completions: Sequence[Completion]) -> str:
    """Hash of what a number computed from a row depends on: its tokens and which of them are trained."""
    digest = hashlib.blake2b(prompt.tobytes(), digest_size=16)
    for tokens, mask in completions:
        digest.update(b"|")
        digest.update(tokens.tobytes())
        digest.update(mask.tobytes())
    return digest.hexdigest()
