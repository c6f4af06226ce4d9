# SPDX-License-Identifier: Apache-2.0
"""Tokenizers small enough to read: one token per word, newline or space, and chat templates of every kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_realign import data
from mlx_realign.config import TrainSettings
from mlx_realign.data.store import Dataset

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<|end|>"]
WORDS = "system user assistant tool a b c d e f g User: Assistant: <think> </think> You help qzjxvkw . \n \u2420".split(
    " "
)

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TEMPLATES = {
    # A newline after the end token.
    "chatml": "{% for m in messages %}" + _TURN + "{% endfor %}" + _OPEN,
    # BOS from the template, trimmed content, nothing after the end token.
    "llama3": "<s>{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
    # Generation markers around content, end token and newline.
    "marked": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}" + _TURN + "{% endif %}{% endfor %}" + _OPEN,
    # Generation markers around the header as well, the end token outside.
    "marked_badly": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m.content }}{% endgeneration %}<|im_end|>\n{% else %}" + _TURN + "{% endif %}{% endfor %}" + _OPEN,
    # Markers that leave out the thinking.
    "marked_answer": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set parts = m.content.split('</think>') %}{% if parts | length > 1 %}{{ parts[0] }}</think>{% endif %}"
    "{% generation %}{{ parts[-1] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _OPEN,
    # Thinking is dropped from all turns but the last (Qwen3).
    "qwen3": "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% else %}" + _TURN + "{% endif %}{% endfor %}" + _OPEN,
    # The generation prompt opens a thought that finished turns do not keep (DeepSeek-R1).
    "r1": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% else %}" + _TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    # An extra token at the very end of a finished conversation (Phi-3).
    "phi3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}",
    # Two tokens end a turn (Cohere 2).
    "cohere": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|><|eot|>{% endfor %}" + _OPEN,
    # The last turn ends with another token than the others (gpt-oss).
    "harmony": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|eot|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}" + _OPEN,
    # Content must be a list of parts (models that also see images).
    "parts": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + _OPEN,
    # No end token at all.
    "endless": "{% for m in messages %}{{ 'User:' if m.role == 'user' else 'Assistant:' }}\n{{ m.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}",
    # A default system prompt, and a refusal of anything but user and assistant in turn.
    "strict": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + _TURN
    + "{% endfor %}" + _OPEN,
}  # fmt: skip


def words_tokenizer(template: str | None = None, *, add_bos: bool = False, wrapped: bool = True) -> Any:
    """One token per word, newline or space; `template` is a name of TEMPLATES. bos <s>, eos </s>."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS, " ", "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |<[^<>]*>|[^\s<]+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return wrap(tokenizer, template, wrapped)


def bytes_tokenizer(merges: list[tuple[str, str]], template: str | None = None) -> Any:
    """Byte-level BPE with the merges given (in the byte-level alphabet: newline is Ċ, space Ġ)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return wrap(tokenizer, template, True)


def wrap(tokenizer: Tokenizer, template: str | None, wrapped: bool) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATES[template] if template else None
    return TokenizerWrapper(fast) if wrapped else fast


def load_rows(rows: list[dict], tokenizer: Any, format: str = "sft", **settings: Any) -> Dataset:
    return data.load(rows, tokenizer, format=format, settings=TrainSettings(**settings))


def picture(tokenizer: Any, dataset: Dataset, row: int = 0) -> list[str]:
    """A row as text: "prompt tokens | completion tokens", trained ones with a star, newline as ⏎, space as ␣."""
    example = dataset[row]
    name = lambda i: tokenizer.convert_ids_to_tokens(int(i)).translate(str.maketrans("\n ĊĠ", "⏎␣⏎␣"))  # noqa: E731
    prompt = " ".join(name(i) for i in example.prompt)
    return [
        f"{prompt} | " + " ".join(("*" if trained else "") + name(i) for i, trained in zip(*completion, strict=True))
        for completion in example.completions
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def example_sizes(dataset: Dataset) -> np.ndarray:
    return np.array([len(e.prompt) + sum(len(c.tokens) for c in e.completions) for e in dataset])
