# SPDX-License-Identifier: Apache-2.0
"""The tokeniser as this package uses it: whole texts in batches, positions of characters, ids that end a turn."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import UserError
from . import template
from .messages import KNOWN_OPTIONS, Message, RowError, check_texts, check_unicode

_SENTINEL = "qzjxvkw"  # letters that no template contains, in one word that no template trims


class Encoded:
    """One tokenised text."""

    def __init__(self, text: str, ids: np.ndarray, encoding: Any, words: "Words"):
        self.text, self.ids, self._encoding, self._words = text, ids, encoding, words

    def token_at(self, char: int) -> int:
        """Index of the token that holds this character; at the end of the text, the number of tokens."""
        if self._encoding is not None:
            index = self._index(char) if char < len(self.text) else len(self.ids)
            if index is not None:
                return index
        return common_prefix(self._words.encode([self.text[:char]])[0].ids, self.ids)

    def _index(self, char: int) -> int | None:
        """The encoding's own `char_to_token`, which goes through all tokens, by bisection where they stand in order."""
        starts, ends, ordered = self._offsets
        if not ordered:
            return self._encoding.char_to_token(char)
        index = int(np.searchsorted(ends, char, "right"))
        return index if index < len(ends) and starts[index] <= char else None

    @cached_property
    def _offsets(self) -> tuple[np.ndarray, np.ndarray, bool]:
        starts, ends = np.array(self._encoding.offsets, np.int64).reshape(-1, 2).T
        return starts, ends, bool((np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all())


class Words:
    """A transformers tokenizer, or mlx-lm's wrapper of one, with its chat template.

    Tokens come from the tokenizer's own batch encoder, so special tokens in a text are recognised as they are when
    the model is used, and a rendered template gets no second BOS.
    """

    def __init__(self, tokenizer: Any):
        self.outer = tokenizer
        self.base = getattr(tokenizer, "_tokenizer", tokenizer) if _is_wrapper(tokenizer) else tokenizer
        own = {name for cls in type(self.base).__mro__ if not _is_library(cls) for name in vars(cls)}
        self.backend = None if "encode" in own else getattr(self.base, "backend_tokenizer", None)
        self.renderer = getattr(tokenizer, "_chat_template", None) if _is_wrapper(tokenizer) else None
        written = bool(getattr(self.base, "chat_template", None))
        self.has_template = written or self.renderer is not None or "apply_chat_template" in own
        self.is_jinja = written and self.renderer is None and "apply_chat_template" not in own
        self.has_markers = self.renderer is None and _has_markers(getattr(self.base, "chat_template", None))
        self.eos_id: int | None = self.base.eos_token_id
        self.bos_id: int | None = self.base.bos_token_id
        added = getattr(self.base, "added_tokens_decoder", {})
        special = [*self.base.all_special_ids, *added]
        self._is_special = np.zeros(max(special, default=0) + 2, bool)  # by token id; the last entry is all others
        self._is_special[special] = True
        self.special_texts = tuple(str(token) for token in (*self.base.all_special_tokens, *added.values()))
        self.parts = False  # the template wants content as a list of typed parts
        self.end_token, self.tail = self._find_end_token() if self.has_template else (None, "")
        self.end_id: int | None = self.base.convert_tokens_to_ids(self.end_token) if self.end_token else None
        self.header, self.header_ids = self._find_header() if self.has_template else ("", np.zeros(0, np.int32))
        self.header_token: str = self.base.convert_ids_to_tokens(int(self.header_ids[0])) if self.header else ""

    @property
    def stop_ids(self) -> set[int]:
        """Ids that end a completion: the model's end tokens and the one its template puts after a turn."""
        ids = set(self.outer.eos_token_ids) if self.outer is not self.base else set()
        return ids | {i for i in (self.eos_id, self.end_id) if i is not None}

    def special_positions(self, ids: np.ndarray) -> np.ndarray:
        """Indices of the special tokens among ids."""
        return np.flatnonzero(self._is_special[np.minimum(ids, len(self._is_special) - 1)])

    def encode(self, texts: Sequence[str], *, special: bool = False, offsets: bool = False) -> list[Encoded]:
        """Tokenise whole texts. special: let the tokenizer add BOS (raw text only, a template writes its own)."""
        if not texts:
            return []
        if self.backend is None:
            lists = [self.base.encode(text, add_special_tokens=special) for text in texts]
            return [Encoded(t, np.array(ids, np.int32), None, self) for t, ids in zip(texts, lists, strict=True)]
        self.backend.no_truncation()
        self.backend.no_padding()
        batch = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
        found = batch(list(texts), add_special_tokens=special)
        return [
            Encoded(text, np.array(e.ids, np.int32), e if offsets else None, self)
            for text, e in zip(texts, found, strict=True)
        ]

    def render(self, talks: Sequence[list[Message]], options: dict[str, Any], generate: bool) -> list[str | RowError]:
        """Chat template over conversations. A conversation that the template refuses gives a RowError in its place."""
        if not talks:
            return []
        try:
            bounded = self._bounded(options)
        except ValueError as error:  # several templates, and none of them for this
            return [RowError(f"the chat template refuses these messages: {error}")] * len(talks)
        kwargs = {**options, **bounded, "add_generation_prompt": generate, "tokenize": False}
        talks = [_as_parts(talk) for talk in talks] if self.parts else talks
        if self.renderer is None:
            try:
                texts = self.outer.apply_chat_template(list(talks), **kwargs)
                if isinstance(texts, list) and len(texts) == len(talks):
                    return [_unicode_or_error(text) for text in texts]
            except template.TooMuch:
                raise
            except Exception:  # a template raises what it likes; found one by one below
                pass
        out: list[str | RowError] = []
        for talk in talks:
            try:
                out.append(_unicode_or_error(self.outer.apply_chat_template(talk, **kwargs)))
            except template.TooMuch:
                raise
            except Exception as error:
                out.append(RowError(f"the chat template refuses these messages: {error}"))
        return out

    def markers(self, talks: Sequence[list[Message]], options: dict[str, Any]) -> list[np.ndarray]:
        """bool [tokens] per conversation, True between the template's {% generation %} markers."""
        kwargs = {"enable_thinking": self.outer.has_thinking} if _is_wrapper(self.outer) else {}
        talks = [_as_parts(talk) for talk in talks] if self.parts else talks
        out = self.base.apply_chat_template(
            list(talks),
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{**kwargs, **options, **self._bounded(options)},
        )
        return [np.array(mask, bool) for mask in out["assistant_masks"]]

    def takes(self, name: str) -> bool:
        """Whether a row's value of this name reaches the template: it reads it, or others are known to."""
        return name in KNOWN_OPTIONS or name in self._reads

    @cached_property
    def _reads(self) -> frozenset[str]:
        if not self.is_jinja:
            return frozenset()
        written = self.base.chat_template
        return frozenset().union(*map(template.reads, written.values() if isinstance(written, dict) else [written]))

    def _bounded(self, options: dict[str, Any]) -> dict[str, str]:
        """The template to render with, under limits; nothing where it is code of mlx-lm or of a tokenizer."""
        if not self.is_jinja:
            return {}
        written = self.base.chat_template
        source = self.base.get_chat_template(None, options.get("tools")) if isinstance(written, dict) else written
        return {"chat_template": template.bounded(source)}

    def identity(self) -> str:
        """Hash of everything that decides which tokens a text or a conversation becomes."""
        if self.backend is not None:
            self.backend.no_truncation()
            self.backend.no_padding()
            vocabulary = self.backend.to_str()
        else:
            vocabulary = json.dumps(sorted(self.base.get_vocab().items())) + type(self.base).__qualname__
        rest = [
            str(getattr(self.base, "chat_template", None)),
            f"{getattr(self.renderer, '__module__', '')}.{getattr(self.renderer, '__qualname__', '')}",
            [self.bos_id, self.eos_id, self.end_id, *sorted(self.stop_ids)],
        ]
        return hashlib.blake2b((vocabulary + json.dumps(rest)).encode(), digest_size=16).hexdigest()

    def _find_end_token(self) -> tuple[str | None, str]:
        """The special token that ends an assistant turn, and the text a finished conversation has behind it.

        It is the last of the special tokens right behind what was said, as far as they are the same in the middle of a
        conversation and at its end (Phi-3 closes a conversation with one more).
        """
        ask = {"role": "user", "content": "a"}
        talk = [ask, {"role": "assistant", "content": _SENTINEL}]
        for self.parts in (False, True):
            text = self.render([talk], {}, generate=False)[0]
            if not isinstance(text, RowError) and _SENTINEL in text:
                break
        else:
            raise UserError(
                "the chat template does not show what the assistant says; use --no-chat-template or mend it"
            )
        last = text.rpartition(_SENTINEL)[2]
        longer = self.render([[*talk, ask]], {}, generate=False)[0]
        middle = last if isinstance(longer, RowError) else longer.rpartition(_SENTINEL)[2]
        ids, others = (self.encode([suffix])[0].ids for suffix in (last, middle))
        special = self.special_positions(ids).tolist()
        if not special:
            return None, ""
        at = special[0]
        while at + 1 in special and at + 1 < common_prefix(ids, others):
            at += 1
        token = self.base.convert_ids_to_tokens(int(ids[at]))
        return token, last.partition(token)[2]

    def _find_header(self) -> tuple[str, np.ndarray]:
        """Text and tokens that every generation prompt ends with, from its last special token on; empty if none."""
        talk = [{"role": "user", "content": _SENTINEL}]
        text = self.render([talk], {}, generate=True)[0]
        if isinstance(text, RowError) or _SENTINEL not in text:
            return "", np.zeros(0, np.int32)
        header = text.rpartition(_SENTINEL)[2]
        ids = self.encode([header])[0].ids
        special = self.special_positions(ids)
        if not len(special):
            return "", np.zeros(0, np.int32)
        token = self.base.convert_ids_to_tokens(int(ids[special[-1]]))
        return token + header.rpartition(token)[2], ids[special[-1] :]


def _unicode_or_error(text: str) -> str | RowError:
    try:
        return check_unicode(text, "text of the chat template")
    except RowError as error:
        return error


_known: list[tuple[Any, Any, Words]] = []  # the tokenizers asked for last


def words_of(tokenizer: Any) -> Words:
    """`Words` of a tokenizer, made once: generation asks for every prompt."""
    template = tokenizer.chat_template
    for known, its_template, words in _known:
        if known is tokenizer and its_template == template:
            return words
    words = Words(tokenizer)
    _known.insert(0, (tokenizer, template, words))
    del _known[4:]
    return words


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def shared_text(texts: Iterable[str]) -> int:
    """Number of leading characters that all texts share."""
    low, high = min(texts), max(texts)  # what the extremes share, all share
    n = min(len(low), len(high))
    if low[:n] == high[:n]:
        return n
    return next(i for i in range(n) if low[i] != high[i])


def encode_prompt(prompt: str | list[Message], tokenizer: Any, chat_template: bool = True) -> list[int]:
    """Token ids that a completion is generated from, exactly as training sees them.

    prompt: a string (with a template: one user message) or messages. Raises UserError where messages meet a tokenizer
    without a template, or the template refuses them.
    """
    words = words_of(tokenizer)
    try:
        check_texts(prompt, "prompt")
    except RowError as error:
        raise UserError(str(error)) from None
    if chat_template and words.has_template:
        talk = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = words.render([talk], {}, generate=True)[0]
        if isinstance(text, RowError):
            raise UserError(str(text))
        return words.encode([text])[0].ids.tolist()
    if isinstance(prompt, str):
        return open_text(words.encode([prompt], special=True)[0].ids, words).tolist()
    if chat_template:
        raise UserError("the model has no chat template, so the prompt must be a string; or use --no-chat-template")
    return raw_messages(prompt, words).tolist()


def stop_ids(tokenizer: Any) -> set[int]:
    """Ids that end a completion: the model's end tokens and the one its chat template puts after a turn."""
    return words_of(tokenizer).stop_ids


def open_text(ids: np.ndarray, words: Words) -> np.ndarray:
    """Raw text as tokens: one BOS at most (the text may bring its own), no end token the tokenizer put there."""
    if len(ids) > 1 and ids[0] == ids[1] == words.bos_id:
        ids = ids[1:]
    return ids[:-1] if len(ids) > 1 and ids[-1] == words.eos_id else ids


def raw_messages(messages: list[Message], words: Words, first: bool = True) -> np.ndarray:
    """Messages without a template: one per line, the end token after each of the assistant's. first: BOS is allowed."""
    ids = []
    for i, message in enumerate(messages):
        said = message.get("content") or ""
        ended = message["role"] == "assistant"
        text = words.encode([said if ended else f"{said}\n"], special=first and i == 0)[0].ids
        ids.append(open_text(text, words))
        if ended:
            ids.append(np.array([words.eos_id], np.int32))
    return np.concatenate(ids)


def _as_parts(talk: list[Message]) -> list[Message]:
    """Content as typed parts: templates of models that also see images loop over them."""
    said = lambda text: [{"type": "text", "text": text}] if isinstance(text, str) else text  # noqa: E731
    return [{**message, "content": said(message.get("content"))} for message in talk]


def _is_wrapper(tokenizer: Any) -> bool:
    return type(tokenizer).__name__ == "TokenizerWrapper"


def _is_library(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("transformers", "builtins")


def _has_markers(template: Any) -> bool:
    text = " ".join(template.values()) if isinstance(template, dict) else str(template or "")
    return "endgeneration" in text
