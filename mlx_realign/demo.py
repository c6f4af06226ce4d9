# SPDX-License-Identifier: Apache-2.0
"""Realign the embedded model with each method and show what changed, measured on held-out prompts by generating.

    mlx-realign demo                       (offline; two minutes on two CPU cores)
    mlx-realign demo --methods dpo --output demo-run

Every row starts from the same model, tiny-chat. Shares are of greedy replies to prompts no row of data contains.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from . import cli, flags, rollout, steering, vectors
from . import demo_world as world
from .errors import UserError
from .loading import EMBEDDED
from .policy import Policy
from .terminal import Console

MAX_NEW_TOKENS = 40


class Row(NamedTuple):
    """One method of the demo."""

    changes: str
    rows: Callable[..., list[dict[str, Any]]]
    size: int
    """Number of training rows."""
    settings: dict[str, str]
    """Flags beside model, data and output; `method` where it is not the row's own name."""
    goal: str
    """The measure (a name of world.held_out) that the method should move."""
    keeps: tuple[str, ...] = ()
    """Measures it should leave as they are."""
    command: tuple[str, ...] = ("train",)
    """Of mlx-realign."""


ROWS = {
    "sft": Row(
        "shows right sums to a model that forgets the carry",
        world.sft_rows,
        480,
        {"batch-size": "16", "learning-rate": "1e-3"},
        goal="sums right",
        keeps=("facts right",),
    ),
    "dpo": Row(
        "prefers the polite voice to the curt one",
        world.pair_rows,
        320,
        {"batch-size": "8", "learning-rate": "5e-4"},
        goal="polite",
        keeps=("sums right", "facts right"),
    ),
    "orpo": Row(
        "the same in one stage, without a reference",
        world.pair_rows,
        320,
        {"batch-size": "8", "learning-rate": "1e-3"},
        goal="polite",
        keeps=("sums right", "facts right"),
    ),
    "cpo": Row(
        "the same without a reference, held by likelihood",
        world.pair_rows,
        320,
        {"batch-size": "8", "learning-rate": "5e-4"},
        goal="polite",
        keeps=("sums right", "facts right"),
    ),
    "simpo": Row(
        "the same by mean log-probs and a margin",
        world.pair_rows,
        320,
        {"method": "cpo", "loss-type": "simpo", "gamma": "1", "batch-size": "8", "learning-rate": "5e-4"},
        goal="polite",
        keeps=("sums right", "facts right"),
    ),
    "kto": Row(
        "the same from single replies marked good or bad",
        world.marked_rows,
        640,
        {"batch-size": "8", "learning-rate": "5e-4"},
        goal="polite",
        keeps=("sums right", "facts right"),
    ),
    "grpo": Row(
        "tries sums itself, rewarded where a program finds them right",
        world.problem_rows,
        512,
        {
            "verifier": "numeric",
            "group-size": "8",
            "batch-size": "16",
            "max-new-tokens": "16",
            "learning-rate": "1e-3",
            "steps": "40",
        },
        goal="sums right",
        keeps=("facts right",),
    ),
    "rlvr": Row(
        "the same from given tries that are marked right and wrong",
        world.solved_rows,
        320,
        {"loss-type": "topr", "batch-size": "8", "learning-rate": "1e-3", "scale-rewards": "none"},
        goal="sums right",
        keeps=("facts right",),
    ),
    "abliteration": Row(
        "loses the direction of declining, without a gradient",
        world.contrast_rows,
        280,
        {"markers": ",".join(world.REFUSALS), "max-new-tokens": "24"},
        goal="Zarnia: declines",
        keeps=("other lands: declines", "sums right", "facts right"),
        command=("ablate",),
    ),
    "steering": Row(
        "adds a direction while it generates; off, it is gone",
        world.mood_rows,
        120,
        {"position": "mean", "block": "2", "kl-budget": "4"},  # more than a token in twenty is to change
        goal="grey mood",
        keeps=("sums right", "facts right"),
        command=("steer", "extract"),
    ),
}
DIRECTION = "direction.safetensors"
OFF = "{} when off again"


@dataclass(frozen=True)
class Settings:
    """What `demo` can be told."""

    output: str | None = None
    """Keep training rows, adapters and logs in this folder; default: a temporary one."""
    methods: tuple[str, ...] = tuple(ROWS)
    """Rows to run."""
    seed: int = 0
    """Of the training rows, their order and the adapter's start."""
    quick: bool = False
    """Few rows and prompts: shows that everything runs, not what it can do."""
    json: bool = False
    """Print one JSON object per method instead of the table."""


@dataclass
class Result:
    """One row of the table; shares from 0 to 1, by measure."""

    method: str
    changes: str
    goal: str
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    train_s: float = 0.0
    seconds: float = 0.0
    """Training, and generating the replies after it."""


def main(argv: list[str]) -> int:
    """The command; returns 0."""
    settings = flags.parse(Settings, argv, prog="mlx-realign demo", doc=__doc__ or "")
    unknown = [method for method in settings.methods if method not in ROWS]
    if unknown:
        raise UserError(f"--methods {unknown[0]}: the demo has no such row; it has {', '.join(ROWS)}.")
    began = time.perf_counter()
    with ExitStack() as stack:
        output = settings.output or stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-realign-demo-"))
        status = stack.enter_context(Console(stderr=True).status("measuring tiny-chat as it is"))
        before = measure(Policy.load(EMBEDDED), settings, _measures(settings.methods))
        results = []
        for method in settings.methods:
            status.update(f"{method}: training on {EMBEDDED}, then measuring")
            results.append(run(method, Path(output), settings, before))
            if settings.json:
                print(json.dumps(asdict(results[-1])), flush=True)
    if not settings.json:
        Console().print(table(results))
        print(f"{time.perf_counter() - began:.0f} s in all. Shares of greedy replies to held-out prompts.")
        if settings.output:
            print(f"Adapters, training rows and logs are in {output}.")
    return 0


def run(method: str, output: Path, settings: Settings, before: dict[str, float]) -> Result:
    """Runs one method on tiny-chat through the command line's own entry and measures what it made."""
    row, folder, began = ROWS[method], output / method, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    rows = row.rows(16 if settings.quick else row.size, seed=settings.seed)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    chosen = {"model": EMBEDDED} | row.settings
    if row.command == ("train",):
        chosen = {"method": method} | chosen | {"data": str(data), "output": str(folder), "seed": str(settings.seed)}
    else:
        found = folder / DIRECTION if "steer" in row.command else folder / "adapter"
        chosen |= {"positive": str(data), "output": str(found)}
    argv = ["--json", *(word for name, value in chosen.items() for word in (f"--{name}", value))]
    name, *words = row.command
    with open(folder / "train.log", "w") as log, redirect_stdout(log):
        code = import_module(f".{name}", __package__).main([*words, *argv])
    if code:
        raise SystemExit(code)
    train_s = time.perf_counter() - began
    names = (row.goal, *row.keeps)
    kept = {name: before[name] for name in names}
    if "steer" in row.command:
        policy = Policy.load(EMBEDDED)
        with steering.steer(policy, vectors.load(folder / DIRECTION, policy=policy)):
            after = measure(policy, settings, names)
        off = OFF.format(row.goal)
        kept, after = kept | {off: before[row.goal]}, after | {off: measure(policy, settings, (row.goal,))[row.goal]}
    else:
        made = folder if row.command == ("train",) else folder / "adapter"
        after = measure(Policy.load(EMBEDDED, adapter=str(made)), settings, names)
    return Result(method, row.changes, row.goal, kept, after, train_s, time.perf_counter() - began)


def measure(policy: Policy, settings: Settings, names: tuple[str, ...]) -> dict[str, float]:
    """Share (0 to 1) of the policy's greedy replies that show each behaviour, by name of world.held_out."""
    count = 12 if settings.quick else 100
    judged = world.held_out(count)
    generate = lambda prompts: rollout.complete(policy, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=count)  # noqa: E731
    return {name: world.measure(judged[name], generate) for name in names}


def table(results: list[Result]) -> Table:
    """Method, what it should change, before, after, seconds; measures it should keep come on lines of their own."""
    found = Table(title=f"{EMBEDDED} realigned", title_justify="left")
    found.add_column("method")
    found.add_column("what it should change")
    for name in ("before", "after", "seconds"):
        found.add_column(name, justify="right")
    for one in results:
        found.add_row(
            f"[bold]{one.method}[/bold]",
            f"{one.goal}: {one.changes}",
            f"{one.before[one.goal]:.0%}",
            f"[bold]{one.after[one.goal]:.0%}[/bold]",
            f"{one.seconds:.0f}",
        )
        for name in [name for name in one.before if name != one.goal]:
            found.add_row("", f"  keeps {name}", f"{one.before[name]:.0%}", f"{one.after[name]:.0%}", "")
    return found


def _measures(methods: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for method in methods for name in (ROWS[method].goal, *ROWS[method].keeps)))


if __name__ == "__main__":
    sys.exit(cli.run(main))
