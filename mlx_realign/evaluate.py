# SPDX-License-Identifier: Apache-2.0
"""Measure a model on problems that verifiers can judge: pass@1, pass@k, form, length, before and after an adapter.

    mlx-realign evaluate --model tiny-chat --data problems.jsonl --verifier exact
    mlx-realign evaluate --model Qwen/Qwen3-0.6B --adapter output --before --data test.jsonl --verifier math,format

Every problem gets one greedy completion and --samples sampled ones. Rows are those of grpo and rlvr; responses that
they hold are not looked at. Intervals are 95%, over problems: completions of one problem resemble each other.
"""

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import adapter, cli, data, flags, rollout, verifiers, ways
from .config import TrainSettings
from .data import formats, pipeline
from .data import source as sources
from .data.encode import Encoder
from .data.messages import RowError
from .errors import UserError
from .evaluate_answers import Answers, Bench, Problem, measure
from .evaluate_report import compare, summarise, write
from .policy import Policy
from .reach import Reach
from .terminal import Console
from .verifiers.combine import weigh

USUAL_K = (1, 4, 8)

Rows = str | Path | Sequence[dict[str, Any]]
Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """What `evaluate` can be told."""

    model: str
    """Model folder, hub id, or `tiny-chat` (embedded)."""
    data: str
    """Problems: JSONL file, folder with test.jsonl (else valid.jsonl), or hub dataset id."""
    verifier: str
    """Who judges, comma-separated: names with an optional `:argument`, path/to/file.py:function."""
    adapter: str | None = None
    """Adapter folder (mlx-lm or PEFT) to apply."""
    before: bool = False
    """Measure the model without the adapter too, and the difference problem by problem."""
    reward_weights: tuple[float, ...] = ()
    """One per verifier, for the mean reward; default: 1 for correctness, 0.2 for form. 0: only reported."""
    limit: int | None = None
    """Only the first rows of the file, this many; -n is the same."""
    split: str | None = None
    """Which file of a folder; default: test, or valid where there is no test."""
    samples: int = 8
    """Sampled completions per problem; 0: greedy only."""
    k: tuple[int, ...] = ()
    """pass@k for these k, at most --samples; default: 1, 4 and 8 as far as --samples goes."""
    temperature: float = 1.0
    """Of the sampled completions."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 is off."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability; 0 is off."""
    max_new_tokens: int = 256
    """Most tokens of one completion."""
    batch_size: int = 64
    """Completions generated at once."""
    seed: int = 0
    """Of the sampled completions."""
    output: str | None = None
    """Write every completion with its verdicts to this new file, one JSON object a line."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read or judged (counted and said) instead of stopping."""
    unsafe_code: bool = False
    """Let a verifier run a model's code where it cannot be isolated."""
    chat_template: bool = True
    """Continue the raw text of a prompt instead of rendering it as a chat."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is float32 on CPU, else the model's own."""
    quantize: Literal[4, 8] | None = None
    """Quantise the weights at load."""
    cpu_dequantize: Literal["auto", "never"] = "auto"
    """On CPU, quantised weights are dequantised to float32 at load, which is 30 times faster there."""
    trust_remote_code: bool = False
    """Let code in the model folder run."""
    json: bool = False
    """Print one JSON object instead of the table."""


def main(argv: list[str]) -> int:
    """The command; returns 0."""
    words = ["--limit" if word == "-n" else word for word in argv]
    settings = flags.parse(Settings, words, prog="mlx-realign evaluate", doc=__doc__ or "")
    check(settings)
    specs = verifiers.split(settings.verifier)
    judges_of(specs, settings.reward_weights)  # who cannot judge is told before the model is loaded
    options = {name: getattr(settings, name) for name in ("dtype", "quantize", "cpu_dequantize", "trust_remote_code")}
    with ExitStack() as stack:
        status = stack.enter_context(Console(stderr=True).status(f"loading {settings.model}"))
        policy = Policy.load(settings.model, adapter=settings.adapter, **options)
        for note in (*policy.notes, *ways.notes(policy)):
            print(note, file=sys.stderr)
        record = recorder(Path(settings.output), stack) if settings.output else _nothing
        began = time.perf_counter()
        found = run(policy, settings.data, settings, specs, record=record, say=status.update)
        found["seconds"] = round(time.perf_counter() - began, 1)
    for line, reason in found["left_out_lines"]:
        print(f"line {line}: left out: {reason}", file=sys.stderr)
    if settings.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        write(found, Console())
    return 0


def evaluate(
    policy: Policy,
    rows: Rows,
    *,
    verifier: str | Sequence[str],
    record: Record | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a policy as it stands, from Python, with fields of Settings as options.

    rows: path, hub id or a list of rows. verifier: as on the command line, or a list. record: called with every
    completion and its verdicts; say: with what is being done. Returns the settings, `problems` (how many), `left_out`
    (how many; `left_out_lines` [(line, reason)] has the first), and under `greedy` and `sampled` the rates "pass@1",
    "pass@4" ..., "format" (all verifiers of form give 1; only where there are such), "unparsed" and "cut" (at
    max_new_tokens), each {value, low, high, problems}, shares from 0 to 1, None where nothing was judged; `tokens`
    {mean, max}, `reward` (mean), `scores` (mean) and `reasons` (counts) by verifier, `completions`, `unjudged`.
    before=True adds `before` {greedy, sampled}, of the policy without its adapter, and `difference` {greedy, sampled}:
    after - before of each rate, {value, low, high, higher, lower, p}: how many problems rose and fell, and the sign
    test's p. UserError for rows or options that cannot be used.
    """
    specs = verifiers.split(verifier) if isinstance(verifier, str) else list(verifier)
    fields = flags.fields_of(Settings)
    if unknown := next((name for name in options if name not in fields), None):
        raise UserError(f"evaluate has no setting {unknown!r}.{flags.nearest(unknown, fields)}")
    named = str(rows) if isinstance(rows, str | Path) else "rows"
    values: dict[str, Any] = {"model": policy.name, "data": named, "verifier": ",".join(specs)} | options
    if adapter.adapters_of(policy.model):
        values.setdefault("adapter", "its adapter")
    settings = Settings(**{name: flags.convert(fields[name].kind, value, name) for name, value in values.items()})
    check(settings)
    return run(policy, rows, settings, specs, record=record or _nothing, say=say or _nothing)


def check(settings: Settings) -> None:
    """UserError for a value out of its range or two that do not go together, naming the flag."""
    ranges = {
        "limit": (settings.limit is None or settings.limit >= 1, "at least 1"),
        "samples": (settings.samples >= 0, "0 or more"),
        "temperature": (0 <= settings.temperature < float("inf"), "0 or more"),
        "top_p": (0 < settings.top_p <= 1, "above 0 and at most 1"),
        "top_k": (settings.top_k >= 0, "0 or more"),
        "min_p": (0 <= settings.min_p <= 1, "between 0 and 1"),
        "max_new_tokens": (settings.max_new_tokens >= 1, "at least 1"),
        "batch_size": (settings.batch_size >= 1, "at least 1"),
        "seed": (0 <= settings.seed < 2**32, "between 0 and 2**32 - 1"),
    }
    for name, (holds, expected) in ranges.items():
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(settings, name)}.")
    if wrong := [k for k in settings.k if not 1 <= k <= settings.samples]:
        raise UserError(f"--k {wrong[0]} must be at least 1 and at most --samples, which is {settings.samples}.")
    if settings.samples and settings.temperature == 0:
        raise UserError("--temperature 0 gives the greedy completion every time: raise it, or use --samples 0.")
    if settings.before and not settings.adapter:
        raise UserError("--before measures the model without its adapter too: name the adapter with --adapter.")
    if settings.output and Path(settings.output).exists():
        raise UserError(f"--output {settings.output}: exists already. Give a new file.")
    if settings.output and not Path(settings.output).absolute().parent.is_dir():
        raise UserError(f"--output {settings.output}: its folder does not exist. Make it first.")


def judges_of(specs: Sequence[str], weights: Sequence[float]) -> tuple[list[verifiers.Verifier], list[float]]:
    """The verifiers asked for and their weights. UserError where one is unknown, or none judges correctness."""
    if not specs:
        raise UserError("--verifier is empty: name who judges, math say.")
    judges = [verifiers.find(spec) for spec in specs]
    if twice := [spec for spec, count in Counter(specs).items() if count > 1]:
        raise UserError(f"--verifier names {twice[0]} twice: drop one.")
    found, _ = weigh(judges, weights or None)
    if not any(weight for judge, weight in zip(judges, found, strict=True) if not judge.shaping):
        raise UserError(f"--verifier {','.join(specs)}: only form is judged; add who judges what is right, math say.")
    return judges, found


def run(
    policy: Policy,
    rows: Rows,
    settings: Settings,
    specs: Sequence[str],
    *,
    record: Record,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """As `evaluate`, with the settings in one piece and checked, and the verifiers told apart."""
    judges, weights = judges_of(specs, settings.reward_weights)
    names = ("model", "adapter", "data", "samples", "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed")
    found: dict[str, Any] = {name: getattr(settings, name) for name in names} | {"verifier": list(specs)}
    with verifiers.Pool(specs, unsafe_code=settings.unsafe_code) as pool:
        problems, bad = read_problems(rows, policy.tokenizer, settings, pool, policy.reach)
        found |= {"problems": len(problems), "left_out": bad.counts["bad"], "left_out_lines": bad.bad}
        told = {"seed": settings.seed, "batch_size": settings.batch_size}
        bench = Bench(policy, modes_of(settings), pool, judges, weights, record, say, **told)
        old: dict[str, Answers] = {}
        if settings.before:
            with policy.adapter_off():
                old = measure(bench, problems, before=True)
        new = measure(bench, problems, before=False)
        found["troubles"] = dict(pool.troubles)
    usual = [k for k in USUAL_K if k <= settings.samples]
    ks = {"greedy": (1,), "sampled": tuple(sorted({1, *(settings.k or usual)}))}
    found |= {mode: summarise(new[mode], judges, ks[mode]) for mode in new}
    if old:
        found["before"] = {mode: summarise(old[mode], judges, ks[mode]) for mode in new}
        found["difference"] = {mode: compare(old[mode], new[mode], judges, ks[mode]) for mode in new}
    return found


def modes_of(settings: Settings) -> dict[str, tuple[rollout.Sampling, int]]:
    """Name -> how completions are drawn, and how many of each problem."""
    most, drawn = settings.max_new_tokens, ("temperature", "top_p", "top_k", "min_p")
    modes = {"greedy": (rollout.Sampling(max_new_tokens=most, temperature=0.0), 1)}
    if settings.samples:
        sampling = rollout.Sampling(max_new_tokens=most, **{name: getattr(settings, name) for name in drawn})
        modes["sampled"] = (sampling, settings.samples)
    return modes


def read_problems(
    rows: Rows, tokenizer: Any, settings: Settings, pool: verifiers.Pool, reach: Reach | None = None
) -> tuple[list[Problem], pipeline.Problems]:
    """Problems with their prompts as tokens, and what was wrong with the rows left out.

    UserError with every reason where rows cannot be read, or judged by the pool's verifiers, and may not be left out.
    """
    splits = ("test", "valid")
    split = settings.split or next((name for name in splits if data.has_split(rows, name)), splits[0])
    source = sources.resolve(rows, split)
    name = str(source) if isinstance(source, Path) else "rows"
    shared = TrainSettings(skip_bad_rows=settings.skip_bad_rows, chat_template=settings.chat_template)
    bad = pipeline.Problems(name, "groups", shared)
    parsed: dict[int, formats.Row] = {}
    for line, value in itertools.islice(sources.read(source), settings.limit):
        bad.read += 1
        try:
            if isinstance(value, RowError):
                raise value
            bare = {key: v for key, v in value.items() if key != "responses"} if isinstance(value, dict) else value
            parsed[line] = formats.parse(bare, "groups")
        except RowError as error:
            bad.add(line, error)
    for line, reason in pool.check([(line, row.extras["row"]) for line, row in parsed.items()]):
        if parsed.pop(line, None):
            bad.add(line, RowError(reason))
    limits = {"max_length": None, "truncate": "error", "reach": reach}
    encoder = Encoder(tokenizer, chat_template=settings.chat_template, **limits)
    examples = pipeline.examples(list(parsed.items()), encoder, bad)
    bad.bad.sort()
    bad.check(len(examples))
    return [Problem(e.line, e.prompt, e.extras["row"]) for e in examples], bad


def recorder(path: Path, stack: ExitStack) -> Record:
    """Writes JSON lines to a new file, which is made with the first of them and closed with the stack."""
    opened: list[Any] = []

    def record(row: dict[str, Any]) -> None:
        if not opened:
            opened.append(stack.enter_context(open(path, "x", encoding="utf-8", errors="backslashreplace")))
        opened[0].write(json.dumps(row, ensure_ascii=False) + "\n")

    return record


def _nothing(_: Any) -> None:
    pass


if __name__ == "__main__":
    sys.exit(cli.run(main))
