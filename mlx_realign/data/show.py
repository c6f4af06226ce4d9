# SPDX-License-Identifier: Apache-2.0
"""Rows as the model sees them, with the tokens that are trained marked."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from ..batch import Completion, Example
from ..terminal import Console
from . import source as sources
from .encode import Encoder
from .formats import FORMATS, fits, parse
from .messages import RowError

_GUESS = ("unpaired", "pairs", "groups", "sft")  # the one that asks for most keys first
_BEFORE = 64  # tokens in front of a run that it is decoded behind: any that share a character or a space with it


def guess_format(path: str | Path | sources.Rows, split: str) -> str:
    """The format that the first readable row fits; a prompt alone is a group without responses."""
    for _, value in sources.read(sources.resolve(path, split)):
        if isinstance(value, dict):
            found = [format for format in _GUESS if fits(value, format)]
            alone = any(all(key in value for key in keys) for keys, _ in FORMATS["groups"])
            return found[0] if found else "groups" if alone else "sft"
    return "sft"


def show(
    path: str | Path | sources.Rows, format: str, tokenizer: Any, *, count: int, chat_template: bool, split: str
) -> list[dict[str, Any]]:
    """The first `count` rows tokenised, in full length.

    Each {line, prompt, prompt_tokens, completions: [{runs: [{text, trained}], tokens, mask}]}, or {line, error}.
    """
    encoder = Encoder(tokenizer, chat_template=chat_template, max_length=None, truncate="error")
    out: list[dict[str, Any]] = []
    shown = 0
    for line, value in sources.read(sources.resolve(path, split)):
        if shown == count:
            break
        try:
            if isinstance(value, RowError):
                raise value
            found = encoder.encode([(line, parse(value, format))])[0]
        except RowError as error:
            found = [error]
        shown += 1
        out += [_describe(e, encoder) if isinstance(e, Example) else {"line": line, "error": str(e)} for e in found]
    return out


def write(rows: list[dict[str, Any]], console: Console) -> None:
    """Print rows: prompt dim, trained tokens green, untrained ones plain; ⟦trained⟧ where there are no colours."""
    colours = console.color_system is not None and console.is_terminal
    key = "[dim]prompt[/] [bold green]trained[/] not trained" if colours else "prompt | ⟦trained⟧ not trained"
    console.print(key, highlight=False)
    for row in rows:
        console.rule(f"line {row['line']}", characters="-")
        if "error" in row:
            console.print(Text(row["error"], style="red"))
            continue
        if not row["completions"]:
            console.print(Text(f"{row['prompt_tokens']} tokens, no responses", style="italic"))
            console.print(Text(row["prompt"], "dim"), soft_wrap=True, highlight=False)
        for i, completion in enumerate(row["completions"]):
            trained = sum(completion["mask"])
            name = f"completion {i + 1}: " if len(row["completions"]) > 1 else ""
            lengths = f"{name}{row['prompt_tokens']} + {len(completion['mask'])} tokens, {trained} trained"
            console.print(Text(lengths, style="italic"))
            text = Text().append(row["prompt"] if i == 0 else "", "dim")
            for run in completion["runs"]:
                mark = run["trained"] and not colours
                text.append(f"⟦{run['text']}⟧" if mark else run["text"], "bold green" if run["trained"] else "")
            console.print(text, soft_wrap=True, highlight=False)


def _describe(example: Example, encoder: Encoder) -> dict[str, Any]:
    return {
        "line": example.line,
        "prompt": _decode(example.prompt, encoder),
        "prompt_tokens": len(example.prompt),
        "completions": [_describe_completion(example.prompt, c, encoder) for c in example.completions],
        "extras": example.extras,
    }


def _describe_completion(prompt: np.ndarray, completion: Completion, encoder: Encoder) -> dict[str, Any]:
    """Runs of tokens are decoded behind what stands before them: alone, a token may lose its space or half a letter."""
    whole = np.concatenate([prompt, completion.tokens])
    runs, at = [], len(prompt)
    for trained, group in groupby(completion.mask.tolist()):
        near, before = max(0, at - _BEFORE), at
        at += len(list(group))
        text = _decode(whole[near:at], encoder)
        runs.append({"text": text[len(_decode(whole[near:before], encoder)) :], "trained": trained})
    return {"runs": runs, "tokens": completion.tokens.tolist(), "mask": completion.mask.tolist()}


def _decode(ids: np.ndarray, encoder: Encoder) -> str:
    return encoder.words.base.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
