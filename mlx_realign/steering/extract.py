# SPDX-License-Identifier: Apache-2.0
"""A direction from two sets of prompts: states, the check whether they carry one, vectors, strength, report.

    mlx-realign steer extract --model tiny-chat --positive grey.txt --negative bright.txt --output mood.safetensors
    mlx-realign steer extract --model tiny-chat --positive labelled.jsonl --output mood.safetensors --block 2-4

Sets: two .txt files with a prompt per line (or .jsonl with "prompt"), or one .jsonl whose rows say their side:
{"prompt", "label"}, {"positive", "negative"}, or {"prompt", "chosen", "rejected"}, where the completions differ. Beside
the direction, a report (.md) and a plot (.png, where matplotlib is installed) are written.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from .. import capture, directions, rollout, steerability, vectors
from ..errors import UserError
from ..policy import Policy
from ..sampling import Sampling
from ..steerability import Separation
from ..terminal import Console
from ..vectors import About, Direction
from . import pairs, report, where
from .asked import ModelFlags, Operator, blocks_of, load_model
from .calibrate import Calibration, calibrate
from .pairs import Contrast, Prompt
from .spec import BELONGS, Steer

METHODS = {"mean": "mean_difference", "pca": "pca", "logistic": "logistic", "lda": "lda"}
CALIBRATED = ("add", "add_norm", "ablate_add")  # operators whose coefficient is a strength without a natural value
CALIBRATION_PROMPTS = 16

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings(ModelFlags):
    """What `steer extract` can be told."""

    positive: str
    """Prompts that bring the behaviour out: a file; or one file with both sets (see above)."""
    output: str
    """File to write, ending in .safetensors; its report and plot get the same name."""
    negative: str | None = None
    """Prompts that do not: a file."""
    positive_label: str | None = None
    """Which of the two labels of a file is the positive one, where they are not harmful/harmless or the like."""
    paired: bool = False
    """Line i of both files belong together: their differences are looked at pair by pair."""
    method: Literal["mean", "pca", "logistic", "lda"] = "mean"
    """mean: difference of the means; pca: first component of the pairs' differences."""
    pca_variant: Literal["uncentred", "centred", "pair_centred"] = "uncentred"
    """centred (repeng's pca_diff) takes off what all pairs have in common: unsafe; pair_centred is its pca_center."""
    position: str = "last"
    """Where states are taken: last (prompt token), -3 (third from the end), mean (over the completion's tokens)."""
    block: str = "auto"
    """Blocks it is meant for: auto (the one that separates best), 12, or a range such as 8-14."""
    prefix: bool = True
    """Take states at the end of the prompts, although all completions may begin alike."""
    projected: bool = False
    """Take the negative mean's direction out of the vectors."""
    winsorise: float = 1.0
    """Clamp each state to this quantile of its entries first (0.995 for models with outliers); 1 is off."""
    operator: Operator = "add"
    """What it is meant for."""
    positions: str = "all"
    """Tokens it is meant to act on: all, prompt, generated, last or start:stop."""
    angle: float | None = None
    """angular: degrees."""
    low: float | None = None
    """clamp: least projection, in units of the residual stream."""
    high: float | None = None
    """clamp: largest projection."""
    calibrate: bool = True
    """Do not look for the coefficient that meets --kl-budget."""
    kl_budget: float = 1.0
    """Nats: KL to the model without it, 95th percentile over 20 greedy tokens of each prompt (met to within 5%)."""
    max_new_tokens: int = 64
    """--position mean: most tokens of the completions made where the data has none."""
    json: bool = False
    """Print one JSON object instead of tables."""


class Extracted(NamedTuple):
    """What extraction found."""

    direction: Direction
    separations: list[Separation]  # by block
    warning: str | None  # why the prompts can hardly carry a direction
    calibration: Calibration | None
    prefix: list[int]  # tokens that all completions begin with


def command(settings: Settings) -> int:
    """`mlx-realign steer extract`; returns 0."""
    check(settings)
    label = settings.positive_label
    contrast = pairs.read(settings.positive, settings.negative, positive_label=label, paired=settings.paired)
    with Console(stderr=True).status(f"loading {settings.model}") as status:
        policy = load_model(settings)
        found = extract(policy, contrast, settings, say=status.update)
    path = Path(settings.output)
    vectors.save(found.direction, path)
    plot = path.with_suffix(".png") if importlib.util.find_spec("matplotlib") else None
    if plot:
        steerability.plot(found.separations, plot)
    text = report.extraction(found, settings, contrast, policy, plot)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if settings.json:
        print(json.dumps(report.facts(found, settings, contrast)))
        return 0
    console = Console()
    console.print(steerability.table(found.separations))
    for line in report.remarks(found, settings, contrast, policy):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not plot:
        print("no plot: pip install 'mlx-realign[plots]' for it", file=sys.stderr)
    return 0


def check(settings: Settings) -> None:
    """UserError for a value that cannot be meant, naming the flag, before a model is loaded."""
    path = Path(settings.output)
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path}: must end in .safetensors.")
    for made in (path, path.with_suffix(".md"), path.with_suffix(".png")):
        if made.exists():
            raise UserError(f"--output {path}: {made} exists already. Give a new file.")
    position_of(settings.position)
    where.window(settings.positions)
    ranges = {
        "winsorise": (0 < settings.winsorise <= 1, "above 0 and at most 1"),
        "kl_budget": (0 < settings.kl_budget < float("inf"), "above 0"),
        "max_new_tokens": (settings.max_new_tokens >= 1, "at least 1"),
    }
    for name, (holds, expected) in ranges.items():
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(settings, name)}.")
    if settings.operator == "angular" and settings.angle is None:
        raise UserError("--operator angular needs --angle, in degrees from the direction.")
    if settings.operator == "clamp" and settings.low is None and settings.high is None:
        raise UserError("--operator clamp needs --low, --high or both, in units of the residual stream.")
    for name, value in numbers_of(settings).items():
        if settings.operator != BELONGS[name]:
            raise UserError(f"--{name} is for --operator {BELONGS[name]}, not {settings.operator}.")
        if not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, got {value}.")
    calibrated = settings.calibrate and settings.operator in CALIBRATED
    if settings.kl_budget != Settings.kl_budget and not calibrated:
        raise UserError("--kl-budget is what the coefficient is looked for by, and none is: leave it out.")
    if settings.pca_variant != "uncentred" and settings.method != "pca":
        raise UserError(f"--pca-variant is for --method pca, not {settings.method}: drop one of them.")


def numbers_of(settings: Settings) -> dict[str, float]:
    """What the operator needs beside a coefficient."""
    given = {name: getattr(settings, name) for name in ("angle", "low", "high")}
    return {name: value for name, value in given.items() if value is not None}


def position_of(text: str) -> int | None:
    """-1 for last, the number of `-3`, None for mean. UserError for anything else."""
    if text in ("last", "mean"):
        return -1 if text == "last" else None
    if text.startswith("-") and text[1:].isdecimal() and int(text) < 0:
        return int(text)
    raise UserError(f"--position {text}: expected last, mean, or a place from the end such as -3.")


def extract(policy: Policy, contrast: Contrast, settings: Settings, say: Say = lambda _: None) -> Extracted:
    """The direction of a contrast in every block of a policy, with what is known of it. say: told what is being done.

    UserError where sets that must be pairs are not, a block is not there, or a vector is zero.
    """
    paired = contrast.paired or settings.paired
    if paired:
        contrast = pairs.as_pairs(contrast)
    prefix = prefix_of(policy, contrast, settings, say)
    sides = []
    for name in ("positive", "negative"):
        say(f"states of {len(getattr(contrast, name))} {name} prompts")
        states = states_of(policy, contrast, name, settings, prefix)
        sides.append(directions.winsorise(states, settings.winsorise) if settings.winsorise < 1 else states)
    positive, negative = sides
    blocks = list(range(-1, positive.shape[1] - 1))
    say("directions")
    separations = steerability.report(positive, negative, blocks, paired=paired)
    options = {"variant": settings.pca_variant} if settings.method == "pca" else {}
    found: dict[int, np.ndarray] = {}
    for i, block in enumerate(blocks):
        if directions.alike(
            positive[:, i], negative[:, i]
        ):  # the embedding of a last token that all prompts share, say
            continue
        found[block] = directions.extract(METHODS[settings.method], positive[:, i], negative[:, i], **options)
    baseline = {block: negative[:, i].mean(0, dtype=np.float64) for i, block in enumerate(blocks)}
    if settings.projected:
        found = {block: directions.projected(vector, baseline[block]) for block, vector in found.items()}
    if not found:
        raise UserError("both sets give the same states in every block: the prompts do not differ where they are read.")
    median = {s.block: s.median_norm for s in separations}
    about = about_of(policy, contrast, settings, prefix, separations)
    direction = Direction(found, about, {b: baseline[b] for b in found}, {b: median[b] for b in found})
    direction = with_blocks(direction, settings, separations)
    made, warning = None, steerability.warn(separations)
    if settings.calibrate and settings.operator in CALIBRATED:
        say("strength")
        try:
            direction, made = calibrated(policy, direction, contrast, settings)
        except UserError as error:  # the direction is found all the same
            warning = f"{warning or ''} No coefficient was found: {error}".strip()
    return Extracted(direction, separations, warning, made, prefix)


def prefix_of(policy: Policy, contrast: Contrast, settings: Settings, say: Say) -> list[int]:
    """Tokens that the model's completions of both sets begin with; none where states are not those of prompts."""
    if not settings.prefix or settings.position == "mean" or contrast.positive_completions:
        return []
    say("what all completions begin with")
    return capture.response_prefix(policy, contrast.positive, contrast.negative)


def states_of(policy: Policy, contrast: Contrast, side: str, settings: Settings, prefix: list[int]) -> np.ndarray:
    """float32 [n, blocks from -1 on, d] of one side's prompts, or of their completions."""
    prompts: list[Prompt] = getattr(contrast, side)
    said: list[str] = getattr(contrast, f"{side}_completions")
    asked = capture.encode(policy, prompts, prefix=prefix)
    position = position_of(settings.position)
    completions = [policy.tokenizer.encode(text, add_special_tokens=False) for text in said]
    if position is None:
        if not said:
            sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=0.0)
            completions = [group[0].tokens.tolist() for group in rollout.rollout(policy, asked, sampling)]
        return capture.completion_means(policy, asked, completions)
    texts = [[*a, *b] for a, b in zip(asked, completions, strict=True)] if said else asked
    return capture.collect(policy, texts, positions=(position,))[:, :, 0]


def about_of(
    policy: Policy, contrast: Contrast, settings: Settings, prefix: list[int], separations: list[Separation]
) -> About:
    """Where the direction is from and what it is meant for; blocks and strength are yet to come."""
    position = position_of(settings.position)
    variant = f" {settings.pca_variant}" if settings.method == "pca" else ""
    return About(
        method=METHODS[settings.method] + variant + (", projected" if settings.projected else ""),
        position="completion" if position is None else str(position),
        operator=settings.operator,
        positions=settings.positions,
        numbers=numbers_of(settings),
        base_model=policy.name,
        base_hash=policy.base_hash,
        data_hash=contrast.hash,
        template_prefix=tuple(prefix),
        measured=steerability.summary(separations),
    )


def with_blocks(direction: Direction, settings: Settings, separations: list[Separation]) -> Direction:
    """With the blocks it is meant for: --block, or the best one."""
    if settings.block == "auto":
        known = [s for s in separations if s.block in direction.vectors]
        blocks: tuple[int, ...] = (steerability.best(known),)
    else:
        blocks = blocks_of(settings.block, direction, flag="--block")
    return replace(direction, about=replace(direction.about, blocks=blocks))


def calibrated(
    policy: Policy, direction: Direction, contrast: Contrast, settings: Settings
) -> tuple[Direction, Calibration]:
    """The direction with the coefficient that meets the KL budget on some negative prompts, and the trials."""
    steer = Steer(direction, 1.0, operator=settings.operator, positions=settings.positions)
    step = max(1, len(contrast.negative) // CALIBRATION_PROMPTS)
    prompts = contrast.negative[::step][:CALIBRATION_PROMPTS]
    made = calibrate(policy, steer, capture.encode(policy, prompts), budget_nats=settings.kl_budget)
    measured = direction.about.measured | {"kl_p95_nats": round(made.kl, 4)}
    about = replace(direction.about, coefficient=made.coefficient, measured=measured)
    return replace(direction, about=about), made
