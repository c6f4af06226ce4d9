# SPDX-License-Identifier: Apache-2.0
"""All settings of a training run: one frozen object, passed whole. Field name = TOML key = flag (kebab-case)."""

import importlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from .errors import UserError
from .flags import Field, HelpAsked, convert, fields_of, help_text, nearest, scan

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class TrainSettings:
    """Settings every method shares; a method's own come from its `Config` (methods/<name>.py)."""

    model: str = ""
    """Model folder, mlx-community or Hugging Face hub id, or `tiny-chat` (embedded)."""
    data: str = ""
    """JSONL file, folder with train/valid/test.jsonl, or hub dataset id."""
    eval_data: str | None = None
    """Held-out rows; default: valid.jsonl of the data folder."""
    output: str = "output"
    """Folder for the adapter, metrics and checkpoints."""
    adapter: str | None = None
    """Start from this adapter folder (mlx-lm or PEFT)."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder, bit for bit."""
    steps: int | None = None
    """Optimizer steps; default: from epochs."""
    epochs: float = 1.0
    """Passes over the data, when steps is not given."""
    batch_size: int = 4
    """Prompts per micro-batch."""
    batch_tokens: int | None = None
    """Most padded tokens per micro-batch; longer batches are split. Default: no limit."""
    pack: bool = False
    """Lay the rows of a micro-batch side by side, so that next to no token is padding; sft only."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step, weighted by their tokens or pairs."""
    learning_rate: float | None = None
    """Default: the method's, ten times higher for LoRA than for full fine-tuning."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Optimizer steps of linear rise to the learning rate."""
    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """From mlx.optimizers; Adam and AdamW with bias correction."""
    weight_decay: float = 0.0
    """Decoupled decay of the optimizers that have one."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 is off."""
    max_length: int = 1024
    """Most tokens of prompt + completion."""
    truncate: Literal["error", "left", "drop"] = "error"
    """Rows over max_length: stop, cut the prompt's start, or leave the row out (counted)."""
    skip_bad_rows: bool = False
    """Leave out rows that fail validation (counted and said) instead of stopping."""
    chat_template: bool = True
    """Render strings and messages with the tokenizer's chat template; --no-chat-template: raw text plus end token."""
    seed: int = 0
    """Seeds data order, adapter start and dropout."""
    shuffle: bool = True
    """--no-shuffle keeps the order of the file."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; default: at the end of each epoch."""
    save_every: int | None = None
    """Optimizer steps between checkpoints; default: a twentieth of the run, at most 1000."""
    keep: int = 2
    """Newest checkpoints kept (the best one stays as well)."""
    early_stop: int | None = None
    """Stop after this many evaluations without a better one."""
    kl_every: int | None = None
    """Steps between measurements of the KL to the start; default: a twentieth of the run, at least 10; 0 is off."""
    kl_max: float | None = None
    """Most KL to the start, nats per token (0.1 is a usual limit); --kl-action acts above it."""
    kl_action: Literal["lower", "stop", "rollback"] = "lower"
    """Above --kl-max: halve the learning rate, stop, or stop and go back to the best checkpoint measured below."""
    lora_rank: int = 16
    """Rank r of the adapter."""
    lora_alpha: float = 32.0
    """The adapter is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input; only sft takes it above 0."""
    lora_targets: str = "all-linear"
    """`all-linear` or comma-separated module names such as q_proj,v_proj."""
    lora_layers: int = -1
    """Last n blocks; -1 is all."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    rslora: bool = False
    """Rank-stabilised scale (arXiv:2312.03732)."""
    full: bool = False
    """Train all weights instead of an adapter."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts; 0 is off, whatever config.json says."""
    steer: str | None = None
    """Directions, FILE or FILE:coefficient with commas between, added in training only: what they do is not learned."""
    quantize: Literal[4, 8] | None = None
    """Quantise the base at load (QLoRA)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is float32 on CPU, else the model's own."""
    cpu_dequantize: Literal["auto", "never"] = "auto"
    """On CPU, quantised weights are dequantised to float32 at load, which is 30 times faster there."""
    grad_checkpoint: bool = False
    """Recompute layers in the backward pass: less memory, a third more time."""
    memory_limit: float | None = None
    """Most memory MLX may use, GB; on a GPU 85% of the size it recommends, unless given."""
    wired_limit: float | None = None
    """Most memory that a Mac keeps wired, GB; as --memory-limit, and never above the size the GPU recommends."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the step; auto is on for GPUs, off for CPU."""
    trust_remote_code: bool = False
    """Let code in the model folder run."""
    report_to: Literal["none", "wandb", "trackio"] = "none"
    """Also send metrics to this tracker."""
    plan_for: Literal["here", "metal", "cuda", "cpu"] = "here"
    """With --dry-run: the device whose shapes, padding and masks are told; here: this machine's."""
    dry_run: bool = False
    """Load, check, estimate, print, stop."""
    json: bool = False
    """One JSON object per line on standard output instead of a progress bar."""


COMMANDS = {"abliteration": ("ablate",), "steering": ("steer", "extract")}  # methods that have no loss to train by
SHAPE = ("lora_rank", "lora_alpha", "lora_targets", "lora_layers", "dora", "rslora")  # an adapter folder fixes these


class Run(NamedTuple):
    """A training run as asked for."""

    settings: TrainSettings
    method: str
    config: Any  # the method's own frozen `Config`


def handed_over(argv: Sequence[str]) -> list[str] | None:
    """The words of the command that a method of COMMANDS is, the recipe's keys as its flags; None for other methods.

    --data is their --positive: one file whose rows say their side.
    """
    words = list(argv)
    recipe, method = _take(words, "--config"), _take(words, "--method")
    values = _read_recipe(recipe) if recipe is not None else {}
    chosen = values.pop("method", ("", None))[1] if method is None else method
    if chosen not in COMMANDS:
        return None
    values.pop("method", None)
    if "data" in values:  # both commands read one file with labels where there is no second one
        values["positive"] = values.pop("data")
    words = ["--positive" + word[6:] if word.partition("=")[0] == "--data" else word for word in words]
    flags = [word for key, (_, value) in values.items() for word in _as_flag("--" + key.replace("_", "-"), value)]
    return [*COMMANDS[chosen], *flags, *words]


def parse(argv: Sequence[str]) -> Run:
    """Settings from `--config recipe.toml` and flags; a flag overrides the recipe. Prints help and exits 0 for --help.

    UserError for whatever is unknown, of the wrong type or out of range, naming the flag, or file, line and key.
    """
    words = list(argv)
    recipe = _take(words, "--config")
    method = _take(words, "--method")
    values = _read_recipe(recipe) if recipe is not None else {}
    method = method if method is not None else values.pop("method", ("", None))[1]
    values.pop("method", None)
    if method is None:
        if "-h" in words or "--help" in words:
            _print_help(None)
        known = {field.flag for field in fields_of(TrainSettings).values()}
        names = [word.partition("=")[0] for word in words]
        meant = next((name for name in names if name not in known and nearest(name, ["--method"])), None)
        hint = f" {meant} is no flag; did you mean --method?" if meant else ""
        raise UserError(f"--method is needed: one of {', '.join(_methods().names())}.{hint}")
    fields = _fields(method)
    try:
        flags = scan(words, fields)
    except HelpAsked:
        _print_help(method)
    if "steps" in flags and "epochs" in flags:
        raise UserError("--steps and --epochs both say how long to train: give one of them.")
    if "steps" in values and "epochs" in values:
        raise UserError(f"{values['epochs'][0]}: steps and epochs both say how long to train: give one of them.")
    if "epochs" in flags:
        values.pop("steps", None)
    return build(method, {key: convert_entry(fields, key, *entry) for key, entry in values.items()} | flags, flags)


def build(method: str, values: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> Run:
    """Settings from Python values under their field names, checked like flags: the way a library call takes.

    chosen: those of the values that the user wrote for this very run, where some come from a recipe; default: all.
    """
    fields = _fields(method)
    known = {key: convert_entry(fields, key, key, value) for key, value in values.items()}
    if known.get("adapter") and (
        clash := next((key for key in SHAPE if key in (values if chosen is None else chosen)), None)
    ):
        raise UserError(f"--{clash.replace('_', '-')} does not go with --adapter, whose folder says it: drop one.")
    shared = fields_of(TrainSettings)
    settings = TrainSettings(**{key: value for key, value in known.items() if key in shared})
    own = _methods().find(method).Config(**{key: value for key, value in known.items() if key not in shared})
    check(settings)
    return Run(settings, method, own)


def convert_entry(fields: Mapping[str, Field], key: str, where: str, value: Any) -> Any:
    """`value` as the type of field `key`; UserError at `where` when there is no such field or it does not fit."""
    if key not in fields:
        if isinstance(value, dict):
            raise UserError(f"{where}: recipes are flat; move the keys of table [{key}] to the top of the file.")
        raise UserError(f"{where}: unknown key.{nearest(key, fields)} mlx-realign train --help lists them all.")
    return convert(fields[key].kind, value, where)


def check(settings: TrainSettings) -> None:
    """UserError for a value out of its range or two that exclude each other, naming the flag and what is expected."""
    for name in ("model", "data", "output"):
        if not getattr(settings, name):
            raise UserError(f"--{name} is needed: {fields_of(TrainSettings)[name].doc}")
    positive = "steps epochs batch_size batch_tokens gradient_accumulation learning_rate max_length eval_every".split()
    positive += "save_every keep early_stop lora_rank lora_alpha memory_limit wired_limit kl_max".split()
    for name in positive:
        _require(settings, name, "above 0", lambda value: 0 < value < float("inf"))
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "kl_every", "router_aux_loss_coef"):
        _require(settings, name, "0 or more", lambda value: 0 <= value < float("inf"))
    if settings.optimizer != "sgd":
        usual = f"1 or less (with {settings.optimizer} a weight moves by about that in a step; 1e-6 to 1e-2 is usual)"
        _require(settings, "learning_rate", usual, lambda rate: rate <= 1)
    _require(settings, "lora_dropout", "at least 0 and below 1", lambda value: 0 <= value < 1)
    _require(settings, "lora_layers", "-1 (all blocks) or a number of blocks above 0", lambda n: n == -1 or n > 0)
    _require(settings, "max_length", "at least 2: one token of prompt, one of completion", lambda n: n >= 2)
    _require(settings, "seed", "between 0 and 2**32 - 1", lambda n: 0 <= n < 2**32)
    if settings.kl_max is not None and settings.kl_every == 0:
        raise UserError("--kl-max has no effect with --kl-every 0, which measures nothing: drop one of them.")
    if settings.kl_action != "lower" and settings.kl_max is None:
        raise UserError(f"--kl-action {settings.kl_action} needs --kl-max: above which KL, in nats per token.")
    if settings.full:
        clashing = [flag for flag in ("quantize", "dora", "rslora") if getattr(settings, flag)]
        if clashing:
            raise UserError(f"--full trains the weights themselves, so it does not go with --{clashing[0]}: drop one.")


def _require(settings: TrainSettings, name: str, expected: str, holds: Any) -> None:
    value = getattr(settings, name)
    if value is not None and not holds(value):
        raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {value}.")


def _as_flag(flag: str, value: Any) -> list[str]:
    """A recipe's value on the command line."""
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _fields(method: str) -> dict[str, Field]:
    if method in COMMANDS:
        raise UserError(f"--method {method} is a command of its own: mlx-realign {' '.join(COMMANDS[method])}.")
    return fields_of(TrainSettings) | fields_of(_methods().find(method).Config)


def _methods() -> Any:
    """The package of methods, imported late and by name, as it finds its own files: it stands above this module."""
    return importlib.import_module(".methods", __package__)


def _take(words: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` from words and returns the last value."""
    value = None
    while True:
        index = next((i for i, word in enumerate(words) if word == flag or word.startswith(flag + "=")), None)
        if index is None:
            return value
        word = words.pop(index)
        if word == flag and (index >= len(words) or words[index].startswith("--")):
            raise UserError(f"{flag} needs a value.")
        value = word.partition("=")[2] if word != flag else words.pop(index)


def _read_recipe(name: str) -> dict[str, tuple[str, Any]]:
    """Key -> (`file line n: key`, value). A bare name such as `dpo` is the recipe of that name in the package."""
    path = Path(name)
    if not path.is_file():
        path = PACKAGE / "recipes" / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError:
        own = sorted(recipe.stem for recipe in path.parent.glob("*.toml"))
        raise UserError(f"--config {name}: no such file. Recipes in the package: {', '.join(own) or 'none'}.") from None
    except (OSError, ValueError) as error:  # not readable, not UTF-8, not TOML; TOML errors name line and column
        raise UserError(f"--config {name}: {error}") from None
    starts = [line.split("=")[0].strip().strip("[]\"'") for line in text.split("\n")]
    lines = {key: starts.index(key) + 1 if key in starts else 1 for key in values}
    return {key: (f"{name} line {lines[key]}: {key}", value) for key, value in values.items()}


def _print_help(method: str | None) -> NoReturn:
    print("usage: mlx-realign train --method NAME --model MODEL --data DATA [--config RECIPE] [flags]\n")
    print(f"Methods: {', '.join(_methods().names())}. Flags override the TOML recipe; its keys are the flags' names.")
    for name, words in COMMANDS.items():
        print(f"--method {name} is `mlx-realign {' '.join(words)}` with the same flags.")
    print()
    if method is None:
        print("A method's own settings: mlx-realign train --method NAME --help\n")
    else:
        print(f"Settings of {method}:\n{help_text(fields_of(_methods().find(method).Config).values())}\n")
    print(f"Settings of every method:\n{help_text(fields_of(TrainSettings).values())}")
    raise SystemExit(0)
