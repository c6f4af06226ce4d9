# SPDX-License-Identifier: Apache-2.0
"""Talk to a model, with or without an adapter: one prompt, or a chat that remembers its turns.

    mlx-realign generate --model tiny-chat --prompt "What is 3 + 4?"
    mlx-realign generate --model Qwen/Qwen3-0.6B --adapter output       (a chat; Ctrl-D or Ctrl-C ends it)

Prompts are rendered and tokenised exactly as in training. Without --prompt, text piped in is the prompt.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, stream_generate
from mlx_lm.models import cache as kv
from mlx_lm.sample_utils import make_sampler

from . import cli, data, flags, rollout, streams, taps, ways
from .ends import Ended
from .errors import UserError
from .policy import Policy
from .workers import known_thread


@dataclass(frozen=True)
class Settings:
    """What `generate` can be told."""

    model: str
    """Model folder, hub id, or `tiny-chat` (embedded)."""
    adapter: str | None = None
    """Adapter folder (mlx-lm or PEFT) to apply."""
    prompt: str | None = None
    """Answer this and stop; `-` reads it from standard input. Without it: a chat."""
    system: str | None = None
    """System message before the first turn."""
    max_new_tokens: int = 256
    """Most tokens of one completion."""
    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 is off."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability; 0 is off."""
    seed: int | None = None
    """Makes sampling repeatable."""
    chat_template: bool = True
    """Continue the raw text of the prompt instead of rendering it as a chat."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is float32 on CPU, else the model's own."""
    quantize: Literal[4, 8] | None = None
    """Quantise the weights at load."""
    cpu_dequantize: Literal["auto", "never"] = "auto"
    """On CPU, quantised weights are dequantised to float32 at load, which is 30 times faster there."""
    trust_remote_code: bool = False
    """Let code in the model folder run."""
    json: bool = False
    """Print one JSON object (completion, token counts, speed) instead of streaming text."""


class Runner(nn.Module):
    """A model as mlx-lm's generator calls it. Taps on it know where in the text it is and where the prompt ends.

    cached: whether its caches are right; otherwise each call computes the whole text.
    """

    def __init__(self, model: nn.Module, fed: int, last_prompt: int, cached: bool) -> None:
        self.model, self.fed, self.last_prompt, self.cached = model, fed, last_prompt, cached
        self.text = mx.zeros((1, 0), mx.int32)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        start, last = self.fed, mx.array([self.last_prompt])
        self.fed += tokens.shape[1]
        if self.cached:
            with taps.tell(start=start, last_prompt=last):
                return self.model(tokens, cache=cache)
        self.text = mx.concatenate([self.text, tokens], 1)
        with taps.tell(start=0, last_prompt=last):
            return self.model(self.text)[:, start:]


@dataclass
class Session:
    """A model's cache between turns: what the next prompt shares with it is not computed again."""

    policy: Policy
    settings: Settings
    cache: list[Any] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)  # the tokens that are in it
    prompted: int = 0  # how many of them were the prompt
    under: list[mx.array] = field(default_factory=list)  # the numbers of taps (steering, say) they were computed under

    def __post_init__(self) -> None:
        check(self.settings)  # here too: from Python it is where settings come in

    def stream(self, prompt: list[int]) -> Iterator[GenerationResponse]:
        """Completes prompt tokens piece by piece; ends at an end-of-turn token or after max_new_tokens.

        Raises UserError for an empty prompt, and for tokens or lengths beyond the model's tables.
        """
        rollout.refuse_empty(prompt, "generate: the prompt")
        self.policy.reach.refuse([prompt], self.policy.tokenizer, new=self.settings.max_new_tokens)
        known_thread()
        rest = self._reuse(prompt)
        asked = self.settings
        sampler = make_sampler(asked.temperature, asked.top_p, asked.min_p, top_k=asked.top_k)
        runner = Runner(self.policy.model, len(prompt) - len(rest), len(prompt) - 1, self._cached)
        options = {"max_tokens": asked.max_new_tokens, "sampler": sampler, "prompt_cache": self.cache}
        said: list[int] = []
        self.prompted, self.under = len(prompt), taps.held(self.policy.model)
        self.fed = []  # nothing is known of a cache whose computation breaks off
        for piece in stream_generate(runner, self.policy.tokenizer, rest, **options):
            said.append(piece.token)
            self.fed = [*prompt, *said][: runner.fed]
            yield piece

    def _reuse(self, prompt: list[int]) -> list[int]:
        """Trims the cache to what it shares with the prompt and returns the tokens still to feed, at least one."""
        shared = 0
        for old, new in zip(self.fed, prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        if [id(x) for x in self.under] != [id(x) for x in taps.held(self.policy.model)]:
            shared = 0
        elif (reach := taps.reach(self.policy.model)) is not None:  # what was said before is prompt now
            shared = max(0, min(shared, self.prompted - reach, len(prompt) - reach))
        if not shared or not self._cached or not trimmed(self.cache, len(self.fed) - shared):
            self.cache, shared = kv.make_prompt_cache(self.policy.model) if self._cached else [], 0
        return prompt[shared:]

    @property
    def _cached(self) -> bool:
        return ways.tried(self.policy, "alone") is None


def trimmed(caches: Sequence[Any], count: int) -> bool:
    """Whether these caches could forget their last `count` tokens, and have; else they are good for nothing more.

    States that sum up all tokens cannot, nor can windows that have let go of what comes before them.
    """
    if not count:
        return True
    for cache in caches:
        if hasattr(cache, "caches"):
            done = trimmed(cache.caches, count)
        else:
            moved_on = getattr(cache, "start_position", 0) > 0
            done = cache.empty() or (cache.is_trimmable() and not moved_on and cache.trim(count) == count)
        if not done:
            return False
    return True


def check(settings: Settings) -> None:
    """UserError for a value out of its range, naming the flag."""
    ranges = {
        "max_new_tokens": (settings.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= settings.temperature < float("inf"), "0 or more"),
        "top_p": (0 < settings.top_p <= 1, "above 0 and at most 1"),
        "top_k": (settings.top_k >= 0, "0 or more"),
        "min_p": (0 <= settings.min_p <= 1, "between 0 and 1"),
    }
    for name, (holds, expected) in ranges.items():
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(settings, name)}.")
    if settings.system and not settings.chat_template:
        raise UserError("--system is a chat message: it does not go with --no-chat-template.")


def answer(session: Session, text: str) -> None:
    """Prints the completion of one prompt, streamed, or as one JSON object."""
    settings, pieces, last = session.settings, [], None
    streams.ends_with_reader()
    prompt = [*opening(settings), {"role": "user", "content": text}] if settings.system else text
    ids = data.encode_prompt(prompt, session.policy.tokenizer, settings.chat_template)
    try:
        for last in session.stream(ids):
            pieces.append(last.text)
            if not settings.json:
                print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)  # what is said of the end begins a line
        raise
    assert last is not None  # stream_generate always closes with a last piece
    if not settings.json:
        print()
        return
    facts = {
        "prompt": text,
        "completion": "".join(pieces),
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.generation_tokens,
        "prompt_tokens_per_second": round(last.prompt_tps, 2),
        "tokens_per_second": round(last.generation_tps, 2),
        "peak_memory_gb": round(last.peak_memory, 3),
    }
    print(json.dumps(facts, ensure_ascii=False))


def opening(settings: Settings) -> list[dict[str, str]]:
    """The messages before the first user turn."""
    return [{"role": "system", "content": settings.system}] if settings.system else []


def chat(session: Session) -> None:
    """Reads turns from the terminal until Ctrl-D, Ctrl-C or /exit; Ctrl-C during an answer stops that answer."""
    settings, tokenizer = session.settings, session.policy.tokenizer
    streams.ends_with_reader()
    turns = opening(settings)
    data.encode_prompt([*turns, {"role": "user", "content": "Hello"}], tokenizer)  # no chat template: say so first
    print("Chat: /reset forgets the turns, /exit or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except Ended:
            raise
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            turns = opening(settings)
        elif text:
            turns.append({"role": "user", "content": text})
            pieces = []
            try:
                for piece in session.stream(data.encode_prompt(turns, tokenizer)):
                    pieces.append(piece.text)
                    print(piece.text, end="", flush=True)
            except Ended:
                raise
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            print()
            turns.append({"role": "assistant", "content": "".join(pieces)})


def main(argv: list[str]) -> int:
    """The command; returns 0."""
    settings = flags.parse(Settings, argv, prog="mlx-realign generate", doc=__doc__ or "")
    check(settings)
    options = {name: getattr(settings, name) for name in ("dtype", "quantize", "cpu_dequantize", "trust_remote_code")}
    piped = settings.prompt is None and not (sys.stdin and sys.stdin.isatty())
    text = sys.stdin.read().rstrip("\n") if piped or settings.prompt == "-" else settings.prompt
    if settings.json and text is None:
        raise UserError("--json answers one prompt: give it with --prompt.")
    if text is None and not settings.chat_template:
        raise UserError("--no-chat-template continues one text: give it with --prompt.")
    if text is not None and not text.strip():
        raise UserError("--prompt is empty: there is nothing to answer.")
    policy = Policy.load(settings.model, adapter=settings.adapter, **options)
    policy.tokenizer.eos_token_ids = policy.tokenizer.eos_token_ids | data.stop_ids(policy.tokenizer)
    if settings.seed is not None:
        mx.random.seed(settings.seed)
    wrong = ways.tried(policy, "alone")
    for note in (*policy.notes, *([f"{ways.NOTES['whole']}: {wrong}"] if wrong else [])):
        print(note, file=sys.stderr)
    session = Session(policy, settings)
    if text is None:
        import readline  # noqa: F401 - line editing for input()

        chat(session)
    else:
        answer(session, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
