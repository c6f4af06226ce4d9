# SPDX-License-Identifier: Apache-2.0
"""What steering does at several coefficients: how often a scorer says yes, how many texts break, how far tokens move.

    mlx-realign steer eval --steer mood.safetensors --prompts test.txt --markers grey-words.txt
    mlx-realign steer eval --steer mood.safetensors --prompts test.txt --regex "dreary|gloomy|sad" --coefficients 0,2,3
    mlx-realign steer eval --steer sums.safetensors --prompts problems.jsonl --verifier exact --system "Think first."

The scorer is a list of markers (a completion that holds one counts; case, emphasis and spaces aside), a regular
expression, or a verifier of `evaluate`, which gets the row of the prompt. --system adds the model without steering but
with that system message: what asking gives for nothing. Intervals are 95%, Wilson's.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from .. import capture, rollout, verifiers
from ..ablation.scorers import broken, plain
from ..errors import UserError
from ..intervals import Interval, paired, wilson
from ..policy import Policy
from ..sampling import Sampling
from ..terminal import Console
from . import pairs, report
from .apply import steer
from .asked import SteerFlags, UseFlags, load_model, steers_of
from .calibrate import Bench
from .pairs import Prompt
from .spec import Steer

MULTIPLES = (0.0, 0.5, 1.0, 1.5)  # of the file's coefficient, where none are given
KL_PROMPTS, KL_TOKENS, QUANTILE = 32, 20, 0.95
SHOWN, LENGTH = 3, 200  # prompts whose completions the report shows, and characters of each

Accepts = Callable[[Sequence[str], Sequence[dict[str, Any]]], list[float]]  # (completions, rows) -> shares, 0 to 1


@dataclass(frozen=True, kw_only=True)
class Settings(UseFlags, SteerFlags):
    """What `steer eval` can be told."""

    prompts: str
    """Prompts the direction was not made from: .txt, one a line, or .jsonl with "prompt"."""
    markers: str | None = None
    """File of markers, one a line: a completion that holds one is accepted."""
    regex: str | None = None
    """A completion in which this is found is accepted."""
    verifier: str | None = None
    """A verifier (exact, format, path/to/file.py:function ...): a completion with a full 1 is accepted."""
    coefficients: tuple[float, ...] = ()
    """Which to try; default: 0, half, all and one and a half of the file's own."""
    system: str | None = None
    """Also without steering, with this system message: the prompt-only baseline."""
    max_new_tokens: int = 100
    """Most tokens of a completion."""
    batch_size: int = 64
    """Completions generated at once."""
    limit: int | None = None
    """Only the first prompts, this many."""
    kl: bool = True
    """Leave out the KL to the model without steering, which costs a forward pass for each coefficient."""
    unsafe_code: bool = False
    """Let a verifier run a model's code where it cannot be isolated."""
    output: str | None = None
    """Write a report, Markdown, with completions side by side, to this new file."""
    json: bool = False
    """Print one JSON object instead of the table."""


class Measured(NamedTuple):
    """One way to run the model."""

    name: str  # the coefficient, or "system prompt"
    coefficient: float
    accepted: np.ndarray  # float64 [prompts], 0 or 1
    broken: np.ndarray  # float64 [prompts], 0 or 1: empty, or little but repetition
    tokens: float  # mean length of a completion
    kl: float | None  # nats: 95th percentile over tokens of KL(steered || base)
    texts: list[str]

    @property
    def share(self) -> Interval:
        """Of completions accepted."""
        return wilson(float(self.accepted.sum()), len(self.accepted))

    def change(self, base: "Measured") -> Interval:
        """Share accepted minus that of `base`, on the same prompts."""
        return paired(base.accepted, self.accepted, np.ones(len(self.accepted)))


def command(settings: Settings) -> int:
    """`mlx-realign steer eval`; returns 0."""
    check(settings)
    rows = pairs.rows_of(settings.prompts)[: settings.limit]
    with ExitStack() as stack:
        accepts = scorer(settings, stack)
        status = stack.enter_context(Console(stderr=True).status("loading the model"))
        policy = load_model(settings, *settings.steer)
        (one,) = steers_of(settings, policy, force=settings.force)
        found = evaluate(policy, one, rows, accepts, settings, say=status.update)
    facts = facts_of(found, settings, one)
    if settings.output:
        Path(settings.output).write_text(markdown(found, rows, facts), encoding="utf-8")
    if settings.json:
        print(json.dumps(facts))
        return 0
    console = Console()
    console.print(table(found))
    console.print(remark(facts), highlight=False, markup=False, soft_wrap=True)
    return 0


def check(settings: Settings) -> None:
    """UserError for what is missing, out of its range or does not go together, naming the flag."""
    if len(settings.steer) != 1:
        raise UserError(f"--steer is needed once, the direction to measure; it is given {len(settings.steer)} times.")
    named = [name for name in ("markers", "regex", "verifier") if getattr(settings, name) is not None]
    if len(named) != 1:
        said = " and ".join(f"--{name}" for name in named) or "none of them"
        raise UserError(f"who judges is --markers, --regex or --verifier: give one; {said} is given.")
    for name in ("max_new_tokens", "batch_size", "limit"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if wrong := [c for c in settings.coefficients if not abs(c) < float("inf")]:
        raise UserError(f"--coefficients: {wrong[0]} is not a finite number.")
    if settings.output and Path(settings.output).exists():
        raise UserError(f"--output {settings.output}: exists already. Give a new file.")
    if settings.output and not Path(settings.output).absolute().parent.is_dir():
        raise UserError(f"--output {settings.output}: its folder does not exist. Make it first.")


def scorer(settings: Settings, stack: ExitStack) -> Accepts:
    """Who says whether a completion is accepted. UserError for a file, an expression or a verifier that is none."""
    if settings.markers is not None:
        marks = [plain(str(mark)) for mark in pairs.prompts_of(settings.markers, "--markers")]
        if not all(marks):
            raise UserError(f"--markers {settings.markers}: has a line that is in every text. Give words.")
        return lambda texts, rows: [float(any(mark in plain(text) for mark in marks)) for text in texts]
    if settings.regex is not None:
        try:
            known = re.compile(settings.regex)
        except re.error as error:
            raise UserError(f"--regex {settings.regex}: is no regular expression: {error}.") from None
        return lambda texts, rows: [float(known.search(text) is not None) for text in texts]
    pool = stack.enter_context(verifiers.Pool([settings.verifier or ""], unsafe_code=settings.unsafe_code))

    def judge(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        if wrong := pool.check(list(enumerate(rows, 1))):
            raise UserError(f"--verifier {settings.verifier}: row {wrong[0][0]}: {wrong[0][1]}")
        said = pool.judge(texts, rows)
        if pool.troubles:
            raise UserError(f"--verifier {settings.verifier}: {next(iter(pool.troubles.values()))}")
        return [float(verdicts[0].score == 1) for verdicts in said]

    return judge


def evaluate(
    policy: Policy,
    one: Steer,
    rows: Sequence[tuple[Prompt, dict[str, Any]]],
    accepts: Accepts,
    settings: Settings,
    say: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Greedy completions of prompts at each coefficient, judged; the model without steering is always among them."""
    prompts = [prompt for prompt, _ in rows]
    tokens = capture.encode(policy, prompts)
    step = max(1, len(tokens) // KL_PROMPTS)
    say("the model without steering")
    bench = Bench(policy, tokens[::step][:KL_PROMPTS], KL_TOKENS) if settings.kl else None
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=0.0)

    def measure(name: str, coefficient: float, asked: list[list[int]], kl: float | None) -> Measured:
        made = [group[0] for group in rollout.rollout(policy, asked, sampling, rows=settings.batch_size)]
        texts = [each.text for each in made]
        yes = np.array(accepts(texts, [row for _, row in rows]))
        length = float(np.mean([len(each.tokens) for each in made]))
        return Measured(name, coefficient, yes, np.array([float(broken(t)) for t in texts]), length, kl, texts)

    found = []
    with steer(policy, one) as steering:
        for value in chosen(settings, one):
            say(f"coefficient {value:g}")
            steering.set(coefficient=value)
            kl = float(np.quantile(bench.divergences(), QUANTILE)) if bench else None
            found.append(measure(f"{value:g}", value, tokens, kl))
    if settings.system:
        say("the system prompt instead")
        talks = [with_system(prompt, settings.system) for prompt in prompts]
        found.append(measure("system prompt", 0.0, capture.encode(policy, talks), None))
    return found


def chosen(settings: Settings, one: Steer) -> list[float]:
    """The coefficients to try, 0 first: all are held against it."""
    given = settings.coefficients or [float(f"{one.coefficient * share:.3g}") for share in MULTIPLES]
    return list(dict.fromkeys([0.0, *given]))


def with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system message before it, instead of one that it has."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *(turn for turn in turns if turn["role"] != "system")]


# ------------------------------------------------------------------ telling


def facts_of(found: Sequence[Measured], settings: Settings, one: Steer) -> dict[str, Any]:
    """What `--json` prints."""
    base = found[0]
    measured = []
    for each in found:
        shares = {"accepted": each.share, "change": each.change(base), "broken": broken_share(each)}
        numbers = {"coefficient": each.coefficient, "tokens": each.tokens, "kl_p95_nats": each.kl}
        measured.append({"name": each.name, **numbers, **{name: value._asdict() for name, value in shares.items()}})
    judge = next(f"--{n} {v}" for n in ("markers", "regex", "verifier") if (v := getattr(settings, n)) is not None)
    return {
        "steer": settings.steer[0],
        "operator": one.operator,
        "blocks": list(one.at),
        "positions": one.positions,
        "judge": judge,
        "prompts": len(base.texts),
        "max_new_tokens": settings.max_new_tokens,
        "system": settings.system,
        "measured": measured,
    }


def broken_share(one: Measured) -> Interval:
    """Of completions that are empty or repeat themselves."""
    return wilson(float(one.broken.sum()), len(one.broken))


HEAD = ("coefficient", "accepted, %", "change, points", "empty or\nlooping, %", "KL p95,\nnats", "tokens")


def lines(found: Sequence[Measured]) -> list[list[str]]:
    """Cells of the table, a line for each way the model was run."""
    told = []
    for one in found:
        change = "" if one is found[0] else points(one.change(found[0]), sign="+")
        kl = "" if one.kl is None else f"{one.kl:.2f}"
        told.append([one.name, points(one.share), change, points(broken_share(one)), kl, f"{one.tokens:.0f}"])
    return told


def points(value: Interval, sign: str = "") -> str:
    """Percent, with the interval."""
    middle, low, high = (f"{100 * x:{sign}.0f}" for x in value)
    return f"{middle} ({low} to {high})"


def table(found: Sequence[Measured]) -> Table:
    """For the terminal."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in HEAD:
        drawn.add_column(name, justify="right")
    for cells in lines(found):
        drawn.add_row(*cells)
    return drawn


def remark(facts: dict[str, Any]) -> str:
    """What the numbers are made of."""
    blocks = ", ".join(map(str, facts["blocks"]))
    return (
        f"{facts['prompts']} prompts, greedy, at most {facts['max_new_tokens']} tokens; {facts['steer']}, "
        f"{facts['operator']} at block {blocks}, positions {facts['positions']}; judged by {facts['judge']}; "
        "percent with 95% intervals (Wilson's; changes: Newcombe's, paired)"
    )


def markdown(found: Sequence[Measured], rows: Sequence[tuple[Prompt, dict[str, Any]]], facts: dict[str, Any]) -> str:
    """The report."""
    parts = [f"# {Path(facts['steer']).name}: what steering does", remark(facts), report.table(HEAD, lines(found))]
    if facts["system"]:
        parts.append(f"System prompt: {facts['system']!r}")
    for i, (prompt, _) in enumerate(rows[:SHOWN]):
        said = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        parts.append(f"## {' '.join(said.split())[:LENGTH]}")
        shown = [[one.name, " ".join(one.texts[i].split())[:LENGTH]] for one in found]
        parts.append(report.table(["coefficient", "completion"], shown, numbers=False))
    return "\n\n".join(parts) + "\n"
