# SPDX-License-Identifier: Apache-2.0
"""What `ablate` can be told, and what cannot be meant."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..steering.extract import position_of
from .scorers import MARKERS, plain, read_text
from .variants import Variant


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `ablate` can be told."""

    model: str
    """Model folder, hub id, or `tiny-chat` (embedded)."""
    positive: str
    """Prompts that bring the behaviour out: a file; or one file with both sets (see above)."""
    negative: str | None = None
    """Prompts that do not: a file."""
    positive_label: str | None = None
    """Which of the two labels of a file is the positive one, where they are not harmful/harmless or the like."""
    paired: bool = False
    """Line i of both files belong together: their differences are looked at pair by pair."""
    output: str = ""
    """Folder to write: adapter (or with --fuse the model), direction, metrics and report. It must be new or empty."""
    markers: tuple[str, ...] = ()
    """Texts by which the behaviour shows in a reply, comma-separated, or a file of them by line; default: refusals."""
    adapter: str | None = None
    """Adapter folder (mlx-lm or PEFT) to start from: the result holds both."""
    held_out: float = 0.25
    """Share of both sets that is only measured on."""
    limit: int = 256
    """Most prompts of a set that the direction is taken from."""
    eval_limit: int = 100
    """Most held-out prompts of a set."""
    select_prompts: int = 32
    """Prompts of each set that candidates are tried on."""
    method: Literal["mean", "pca", "logistic", "lda"] = "mean"
    """mean: difference of the means; pca: first component of the pairs' differences."""
    direction: str | None = None
    """File of `steer extract` or GGUF vector to remove; prompts are then for the weight and the measures alone."""
    rank: int = 1
    """Directions to remove: 1, or a subspace of so many (the mean difference first)."""
    winsorise: float = 1.0
    """Clamp each state to this quantile of its entries first (0.995 for models with outliers); 1 is off."""
    prefix: bool = True
    """Take states at the end of the prompts, although all completions may begin alike."""
    position: str = "auto"
    """Where states are taken: last (prompt token), -3, mean (over the model's completions), or auto: the best."""
    block: str = "auto"
    """Whose direction is removed: 12, from all writers (12.5: between two); per-block, each its own; auto: the best."""
    weight: str = "auto"
    """How much of it: 1 all; above 1 makes up for embeddings, which are left alone; auto: the least that suffices."""
    attention_weight: float = 1.0
    """What the weight is times for attention (convolutions and state spaces too)."""
    mlp_weight: float = 1.0
    """For MLPs."""
    experts_weight: float = 1.0
    """For the experts of a mixture."""
    blocks: str | None = None
    """Edit only these blocks: 12, 8-20 or 3,5,7-9."""
    writers: tuple[str, ...] = ()
    """Names of more layers that add to the residual stream, where some of the model's were not found."""
    variant: Variant = "plain"
    """projected, biprojected: without the negatives' mean; row-norm, column-norm: norms kept; affine: mean kept."""
    extra_rank: int = 16
    """Ranks by which an adapter comes near a variant that is of full rank; the error is told."""
    max_kl: float | None = None
    """Nats on the negatives: auto (0.1) takes more only if all have more; a search tries such a trial again, weaker."""
    search: bool = False
    """Search weights by block with Optuna (extra `search`) instead of one weight for all."""
    trials: int = 200
    """Of the search."""
    scorers: tuple[str, ...] = ("markers", "kl")
    """What the search makes small: markers, kl, kl:8, perplexity:FILE, accuracy:FILE:VERIFIER, path.py:function."""
    pick: str = "knee"
    """Which of the trials that no other beats: knee (best compromise), best-kl, lowest (first score), or a number."""
    journal: str | None = None
    """File that a search goes on from; default: OUTPUT.search.jsonl beside the output."""
    max_new_tokens: int = 100
    """Most tokens of a completion that is measured; below 100 a behaviour that comes late is missed."""
    kl_tokens: int = 32
    """Tokens of the base's completions along which the KL is measured."""
    text: str | None = None
    """Text file for the perplexity, long paragraphs in windows of 1024 tokens; default: the base's replies."""
    batch_size: int = 64
    """Completions generated at once; by a search three times as many."""
    samples: int = 8
    """Replies of each set shown side by side."""
    fuse: bool = False
    """Write a whole model with the edit in its weights, biases too, instead of an adapter."""
    dequantize: bool = False
    """--fuse: write a quantised model as float weights."""
    force: bool = False
    """--fuse: quantise the edited weights again, although that puts some of the direction back."""
    seed: int = 0
    """Of the split of the prompts, and of the search."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is float32 on CPU, else the model's own."""
    quantize: Literal[4, 8] | None = None
    """Quantise the weights at load."""
    cpu_dequantize: Literal["auto", "never"] = "auto"
    """On CPU, quantised weights are dequantised to float32 at load, which is 30 times faster there."""
    trust_remote_code: bool = False
    """Let code in the model folder run."""
    dry_run: bool = False
    """Print the plan and how well each block separates the sets; write nothing."""
    json: bool = False
    """Print one JSON object; tables go to standard error."""


def check(settings: Settings, *, writes: bool = True) -> None:
    """UserError for a value out of its range or two that do not go together, naming the flag.

    writes: an output is asked for, unless it is a dry run.
    """
    ranges = {
        "held_out": (0 < settings.held_out < 1, "above 0 and below 1"),
        "limit": (settings.limit >= 2, "at least 2"),
        "eval_limit": (settings.eval_limit >= 1, "at least 1"),
        "select_prompts": (settings.select_prompts >= 2, "at least 2"),
        "rank": (settings.rank >= 1, "at least 1"),
        "extra_rank": (settings.extra_rank >= 1, "at least 1"),
        "winsorise": (0 < settings.winsorise <= 1, "above 0 and at most 1"),
        "max_kl": (settings.max_kl is None or settings.max_kl > 0, "above 0"),
        "trials": (settings.trials >= 1, "at least 1"),
        "max_new_tokens": (settings.max_new_tokens >= 1, "at least 1"),
        "kl_tokens": (settings.kl_tokens >= 1, "at least 1"),
        "batch_size": (settings.batch_size >= 1, "at least 1"),
        "samples": (settings.samples >= 0, "0 or more"),
    }
    for name, (holds, expected) in ranges.items():
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(settings, name)}.")
    if settings.position != "auto":
        position_of(settings.position)
    weight_of(settings)
    markers_of(settings)
    block_of(settings)
    _clashes(settings)
    if settings.text and not Path(settings.text).expanduser().is_file():
        raise UserError(f"--text {settings.text}: no such file.")
    if settings.direction and not Path(settings.direction).expanduser().is_file():
        raise UserError(
            f"--direction {settings.direction}: no such file. `mlx-realign steer extract` writes directions."
        )
    output = Path(settings.output)
    if writes and not settings.output and not settings.dry_run:
        raise UserError("--output is needed: the folder to write. --dry-run writes nothing.")
    if settings.output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        journal = journal_of(settings)
        on = f" To go on with its search: a new --output with --journal {journal} (and --pick N for another trial)."
        went = on if settings.search and journal.is_file() else ""
        raise UserError(f"--output {output}: exists and is not an empty folder. Give a new one.{went}")


def _clashes(settings: Settings) -> None:
    fused = {"dequantize": settings.dequantize, "force": settings.force}
    if alone := [name for name, on in fused.items() if on and not settings.fuse]:
        raise UserError(f"--{alone[0]} is for --fuse: add it, or leave --{alone[0]} off.")
    if settings.variant == "affine" and not settings.fuse:
        raise UserError(
            "--variant affine needs a bias, which no adapter holds: add --fuse (float weights), or ablate at inference "
            "instead: mlx-realign steer generate --operator affine."
        )
    if settings.fuse and settings.adapter:
        raise UserError(
            "--fuse with --adapter: fuse the adapter first (mlx-realign export --to fused), or drop --fuse."
        )
    extraction = ("method", "rank", "winsorise", "position", "prefix")
    if settings.direction and (idle := [n for n in extraction if getattr(settings, n) != getattr(Settings, n)]):
        flag = "no-prefix" if idle[0] == "prefix" else idle[0]
        raise UserError(f"--direction is extracted already, and says from where: leave --{flag} off.")
    if settings.rank > 1 and settings.method != "mean":
        raise UserError(f"--rank {settings.rank} begins with the mean difference: it goes with --method mean only.")
    if settings.rank > 1 and isinstance(block_of(settings), float):
        raise UserError(f"--rank {settings.rank} and --block {settings.block}: between two blocks lies one direction.")
    if settings.rank > 1 and settings.variant in ("projected", "biprojected"):
        raise UserError(f"--rank {settings.rank} and --variant {settings.variant} do not go together: use --rank 1.")
    kinds = (settings.attention_weight, settings.mlp_weight, settings.experts_weight)
    if settings.search and any(weight != 1 for weight in kinds):
        raise UserError(
            "--search finds the weights of attention and MLPs itself: leave --attention-weight and so on off."
        )
    searching = {name: getattr(settings, name) for name in ("trials", "scorers", "pick", "journal")}
    if not settings.search and (idle := [n for n, value in searching.items() if value != getattr(Settings, n)]):
        raise UserError(f"--{idle[0]} is for --search: add it, or leave --{idle[0]} off.")
    if settings.search and settings.max_kl is not None and not any(name.startswith("kl") for name in settings.scorers):
        raise UserError("--max-kl with --search is about a KL: add kl to --scorers, or leave --max-kl off.")
    if settings.pick not in ("knee", "best-kl", "lowest") and not settings.pick.isdecimal():
        raise UserError(f"--pick {settings.pick}: expected knee, best-kl, lowest or the number of a trial.")
    if settings.search and settings.variant == "biprojected":
        raise UserError("--search looks for one direction, the same in all blocks: use --variant projected with it.")
    if settings.fuse and settings.quantize:
        raise UserError("--fuse writes the model's own weights, and --quantize changes them: drop one of them.")
    if settings.search and not (settings.output or settings.journal or settings.dry_run):
        raise UserError("--search needs --journal, the file that it goes on from, where there is no --output.")
    if settings.search and (settings.rank > 1 or settings.weight != "auto" or settings.block != "auto"):
        raise UserError(
            "--search finds block and weights itself, for one direction: leave --block, --weight, --rank off."
        )


def block_of(settings: Settings) -> float | None:
    """--block as a number, an int where it is one block; None for auto and per-block."""
    if settings.block in ("auto", "per-block"):
        return None
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", settings.block):
        raise UserError(
            f"--block {settings.block}: expected auto, per-block, the number of a block, or one between two, as 12.5."
        )
    block = float(settings.block)
    return int(block) if block.is_integer() else block


def weight_of(settings: Settings) -> float | None:
    """--weight as a number, None for auto."""
    if settings.weight == "auto":
        return None
    try:
        weight = float(settings.weight)
    except ValueError:
        weight = float("nan")
    if not abs(weight) < float("inf"):
        raise UserError(f"--weight {settings.weight}: expected auto or a number, 1 for all of the direction.")
    return weight


def journal_of(settings: Settings) -> Path:
    """The file that a search goes on from."""
    return Path(settings.journal or f"{settings.output.rstrip('/')}.search.jsonl")


def most_kl(settings: Settings) -> float:
    """Nats: what auto takes."""
    return 0.1 if settings.max_kl is None else settings.max_kl


def kl_limit(settings: Settings) -> float | None:
    """Nats that the edit was to stay within: --max-kl, or what auto takes; None where neither was asked."""
    chosen = not settings.search and "auto" in (settings.weight, settings.block)
    return most_kl(settings) if chosen or settings.max_kl is not None else None


def markers_of(settings: Settings) -> tuple[str, ...]:
    """--markers, read from a file where it names one. UserError for a file that is not there or holds none."""
    if not settings.markers:
        return MARKERS
    if bare := [marker for marker in settings.markers if not plain(marker)]:
        raise UserError(f"--markers: {bare[0]!r} is in every text. Give words, with single commas between them.")
    named = settings.markers[0]
    if len(settings.markers) > 1:
        return settings.markers
    if Path(named).expanduser().is_file():
        found = tuple(line.strip() for line in read_text(named, "--markers").split("\n") if plain(line))
        if not found:
            raise UserError(f"--markers {named}: holds no line. Give one marker per line.")
        return found
    if named.endswith(".txt") or "/" in named:
        raise UserError(f"--markers {named}: no such file. (A marker that looks like one goes into a file of markers.)")
    return settings.markers
