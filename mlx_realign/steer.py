# SPDX-License-Identifier: Apache-2.0
"""Steer a model along a direction: extract one, generate with it, measure, export, say when, watch, screen data.

    mlx-realign steer extract --model tiny-chat --positive grey.txt --negative bright.txt --output mood.safetensors
    mlx-realign steer generate --steer mood.safetensors --prompt "How is the garden?" --compare
    mlx-realign steer eval --steer mood.safetensors --prompts test.txt --markers grey-words.txt
    mlx-realign steer export --steer mood.safetensors --to mlx-lm --output grey-model
    mlx-realign steer condition --model tiny-chat --positive steer.txt --negative leave.txt --output gate.safetensors
    mlx-realign steer monitor --direction mood.safetensors --prompt "How is the garden?"
    mlx-realign steer screen train.jsonl --direction mood.safetensors --output scored.jsonl

`mlx-realign steer NAME --help` says more. In Python: `with mlx_realign.steer(policy, direction): ...`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from . import cli, data, flags, generate, rollout
from .errors import UserError
from .policy import Policy
from .sampling import Sampling
from .steering import Steering, evaluate, export, extract, gate, monitor, screen
from .steering import steer as put_on
from .steering.asked import SteerFlags, UseFlags, joined, load_model, steers_of
from .steering.evaluate import Settings as EvalSettings
from .steering.export import Settings as ExportSettings
from .steering.extract import Settings as ExtractSettings
from .steering.gate import Settings as GateSettings
from .steering.monitor import Settings as MonitorSettings
from .steering.screen import Settings as ScreenSettings
from .terminal import Console


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(UseFlags, SteerFlags, generate.Settings):
    """What `steer generate` can be told."""

    compare: bool = False
    """Also print what the model says without steering."""

    def __post_init__(self) -> None:
        if not self.steer:
            raise UserError("--steer is needed: the file of a direction, mood.safetensors or mood.safetensors:2.5 say.")


GENERATE = """Talk to a steered model: one prompt, or a chat that remembers its turns.

    mlx-realign steer generate --steer mood.safetensors --prompt "How is the garden?" --compare
    mlx-realign steer generate --steer mood.safetensors:2.5,polite.safetensors:-1      (a chat; Ctrl-D ends it)

Several directions are applied in their order. Without --prompt, text piped in is the prompt.
"""


def talk(settings: GenerateSettings) -> int:
    """`mlx-realign steer generate`; returns 0."""
    generate.check(settings)
    text = text_of(settings)
    policy = load_model(settings, *settings.steer)
    policy.tokenizer.eos_token_ids = policy.tokenizer.eos_token_ids | data.stop_ids(policy.tokenizer)
    if settings.seed is not None:
        mx.random.seed(settings.seed)
    with put_on(policy, *steers_of(settings, policy, force=settings.force)) as steering:
        if text is None:
            import readline  # noqa: F401 - line editing for input()

            generate.chat(generate.Session(policy, settings))
        elif settings.compare:
            compare(policy, settings, steering, text)
        else:
            generate.answer(generate.Session(policy, settings), text)
    return 0


def text_of(settings: GenerateSettings) -> str | None:
    """The one prompt to answer, or None for a chat. UserError for what does not go together."""
    piped = settings.prompt is None and not (sys.stdin and sys.stdin.isatty())
    text = sys.stdin.read().rstrip("\n") if piped or settings.prompt == "-" else settings.prompt
    for name in ("compare", "json"):
        if text is None and getattr(settings, name):
            raise UserError(f"--{name} is for one prompt: give it with --prompt.")
    if text is None and not settings.chat_template:
        raise UserError("--no-chat-template continues one text: give it with --prompt.")
    if text is not None and not text.strip():
        raise UserError("--prompt is empty: there is nothing to answer.")
    return text


def compare(policy: Policy, settings: GenerateSettings, steering: Steering, text: str) -> None:
    """Print what the model says to one prompt without and with steering, side by side."""
    prompt = [*generate.opening(settings), {"role": "user", "content": text}] if settings.system else text
    ids = data.encode_prompt(prompt, policy.tokenizer, settings.chat_template)
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")
    sampling = Sampling(**{name: getattr(settings, name) for name in names})
    seed = settings.seed if settings.seed is not None else int(np.random.default_rng().integers(2**31))
    said = {}
    for name, switch in (("without", steering.off), ("with", steering.on)):
        switch()
        said[name] = rollout.rollout(policy, [ids], sampling, seed=seed)[0][0].text
    if settings.json:
        print(json.dumps({"prompt": text, **said}, ensure_ascii=False))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in said:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(words) for words in said.values()))
    Console().print(table)


Command = tuple[type, Callable[[Any], int], str | None]

COMMANDS: dict[str, Command] = {
    "extract": (ExtractSettings, extract.command, extract.__doc__),
    "generate": (GenerateSettings, talk, GENERATE),
    "eval": (EvalSettings, evaluate.command, evaluate.__doc__),
    "export": (ExportSettings, export.command, export.__doc__),
    "condition": (GateSettings, gate.command, gate.__doc__),
    "monitor": (MonitorSettings, monitor.command, monitor.__doc__),
    "screen": (ScreenSettings, screen.command, screen.__doc__),
}


def main(argv: list[str]) -> int:
    """The command; returns 0."""
    name, *words = argv or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: mlx-realign steer {{{','.join(COMMANDS)}}} [flags]\n\n{(__doc__ or '').strip()}")
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"steer has no command {name!r}.{flags.nearest(name, COMMANDS)} There are {', '.join(COMMANDS)}."
        )
    settings, run, doc = COMMANDS[name]
    positional = ("data",) if name == "screen" else ()
    options = {"prog": f"mlx-realign steer {name}", "doc": doc or "", "positional": positional}
    return run(flags.parse(settings, joined(words), **options))


class _Callable(ModuleType):
    """`mlx_realign.steer` is this module, and is called like the function that puts steering on a model."""

    def __call__(self, *args: Any, **options: Any) -> Steering:
        return put_on(*args, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))

sys.modules[__name__].__class__ = _Callable
