# SPDX-License-Identifier: Apache-2.0
"""From a name to a model in memory: local folder, hub id or the embedded tiny-chat, in a dtype to suit the device."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import arguments, untrusted
from .errors import UserError, clipped
from .unsupported import WRONG, explained

EMBEDDED = "tiny-chat"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
GROUP_SIZE = 64
COUNTS = re.compile(r".*layers?|num_blocks|n_blocks?|depth|(?:num|n)_\w*experts?")  # what mlx-lm makes so many of
FEW = 1024  # of them cost nothing
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")  # one of them


class Loaded(NamedTuple):
    """A model with what was done to it on the way in."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    folder: Path
    notes: list[str]
    quantized: int | None = None  # bits, where it was done at load


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    return mx.default_device().type == mx.DeviceType.cpu


def find_model(name: str) -> Path:
    """The local folder of a model name, fetched from the hub when it is a hub id that is not cached.

    Raises UserError in one line: not a folder and not an id, offline and not cached, config or weights missing.
    """
    if not name:
        raise UserError("--model is missing: give a model folder, a hub id such as mlx-community/..., or tiny-chat")
    folder = Path(__file__).parent / "assets" / EMBEDDED if name == EMBEDDED else Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"--model {name}: no such folder, and it is not a hub id (owner/name)")
        folder = _fetch(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {name}: {folder} has no config.json; it must be a Hugging Face model folder")
    _refuse_hostile(name, folder)
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"--model {name}: {folder} has no model*.safetensors; convert the weights to safetensors first")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(f"--model {name}: {folder} has no {TOKENIZERS[0]}; copy it from where the weights came from")
    _refuse_missing_shards(name, folder)
    return folder


def load(
    name: str,
    *,
    dtype: str = "auto",
    quantize: int | None = None,
    cpu_dequantize: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """The model and its tokenizer; each tensor is read, quantised and cast by itself, so memory holds the weights once.

    See TrainSettings for the options. Raises UserError in one line for whatever is missing, broken or unknown.
    """
    folder = find_model(name)
    notes: list[str] = []
    kind = None

    def classes(config: dict[str, Any]) -> Any:
        nonlocal kind
        kind = config.get("model_type")
        if reason := WRONG.get(str(kind)):
            raise UserError(f"--model {name}: {reason}")
        found, told = _completed(config)
        notes.extend(told)
        return found

    try:
        model, config = mlx_lm_utils.load_model(
            folder, lazy=True, get_model_classes=classes, trust_remote_code=trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:  # whatever a broken folder, or a model file, makes the readers raise
        raise UserError(f"--model {name}: cannot be loaded: {explained(kind, _said(error, folder))}") from error
    try:
        options = {"trust_remote_code": trust_remote_code}
        tokenizer = mlx_lm_utils.load_tokenizer(folder, options, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        reason = explained(kind, _said(error, folder))
        raise UserError(f"--model {name}: its tokenizer cannot be read: {reason}") from error
    with one_line(name, config):
        notes += [_quantize(model, config, quantize)] if quantize else []
        _cast(model, DTYPES["float32"] if dtype == "auto" and on_cpu() else DTYPES.get(dtype))
        if on_cpu() and cpu_dequantize == "auto" and _has_quantized(model):
            mlx_lm_utils.dequantize_model(model)
            notes.append("quantised weights dequantised at load: a CPU multiplies packed weights 30 times slower")
        model.eval()
    try:
        _materialise(model)
    except Exception as error:  # a file that ends too early
        raise UserError(f"--model {name}: its weights cannot be read: {_said(error, folder)}") from error
    return Loaded(model, tokenizer, config, folder, notes, None if config.get("quantization") else quantize)


def load_base(folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Model and config.json of a folder, weights as they are on disk and not yet read. UserError if it is broken.

    The config says all that the model was made with: mlx-lm alone reads a folder written with it as `load` does.
    """
    try:
        return mlx_lm_utils.load_model(
            folder,
            lazy=True,
            get_model_classes=lambda config: _completed(config)[0],
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # whatever a broken folder makes the readers raise, the user gets one line
        raise UserError(f"{folder}: cannot be loaded as a model: {_said(error, folder)}") from error


def _completed(config: dict[str, Any]) -> tuple[tuple[type, type], list[str]]:
    """Classes for a config, which is completed for them, and what is to be told of that."""
    found = _classes(config)
    return found, arguments.complete(config, *found)


def _classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's model and arguments; a model file that lacks a package prints so and ends the process: caught."""
    with redirect_stdout(io.StringIO()) as said:
        try:
            return mlx_lm_utils._get_classes(config)
        except SystemExit as error:
            raise ValueError(
                said.getvalue().strip() or f"mlx-lm's {config['model_type']} cannot be imported"
            ) from error


@contextmanager
def one_line(name: str, config: dict[str, Any]) -> Iterator[None]:
    """Inside, whatever an architecture raises becomes a UserError of one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind, reason = config.get("model_type"), f"{type(error).__name__}: {clipped(error, 200)}".rstrip(": ")
        raise UserError(f"--model {name}: {kind} models cannot run here: {explained(kind, reason)}") from error


def _fetch(name: str) -> Path:
    try:
        return Path(mlx_lm_utils._download(name))
    except Exception as error:
        raise UserError(
            f"--model {name}: not on this machine, and the hub cannot be reached or does not have it; give a local "
            f"folder, or connect once to fetch it ({_said(error, Path())})"
        ) from error


def _refuse_missing_shards(name: str, folder: Path) -> None:
    """UserError where the index names weight files that are not there, as an interrupted download leaves them."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        listed = sorted(set(untrusted.read_json(index)["weight_map"].values()))
        outside = [file for file in listed if Path(file).name != file]
    except (ValueError, KeyError, AttributeError, TypeError):
        return  # mlx-lm reads the weight files themselves; a broken index harms nothing
    if outside:
        raise UserError(f"--model {name}: {index.name} names {outside[0]!r}, which is no file of the folder itself")
    missing = [file for file in listed if not (folder / file).is_file()]
    if missing:
        some = ", ".join(missing[:3])
        raise UserError(f"--model {name}: {folder} lacks {some} of {len(listed)} weight files; fetch it again")


def _refuse_hostile(name: str, folder: Path) -> None:
    """UserError for what would keep a reader busy for ever, or what weight files hold other than they say."""
    where = folder
    try:
        untrusted.refuse_odd_entries(folder)
        config = untrusted.read_json(where := folder / "config.json")
        tensors = 0
        for where in sorted(folder.glob("model*.safetensors")):
            tensors += len(untrusted.safetensors_header(where))
    except (ValueError, OSError) as error:
        said = "is not valid JSON" if where.suffix == ".json" else "is not a complete safetensors file"
        said = "cannot be used" if where == folder else said
        raise UserError(f"--model {name}: cannot be loaded: {where.name} {said}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--model {name}: cannot be loaded: config.json is no JSON object")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, value in ((key, value) for part in parts for key, value in part.items()):
        if COUNTS.fullmatch(key) and isinstance(value, int) and value > max(tensors, FEW):
            raise UserError(f"--model {name}: config.json has {key} {value}, and there are {tensors} tensors")


def _quantize(model: nn.Module, config: dict[str, Any], bits: int) -> str:
    """Quantise what mlx-lm's own converter would; says what was done."""
    if config.get("quantization"):
        return f"--quantize {bits} has no effect: the model is quantised to {config['quantization'].get('bits')} bits"
    wanted = getattr(model, "quant_predicate", None)  # routers, for one, keep more bits

    def choose(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP_SIZE:
            return False
        return wanted(path, module) if wanted else True

    nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=choose)
    return f"base quantised to {bits} bits, groups of {GROUP_SIZE}"


def _has_quantized(model: nn.Module) -> bool:
    return any(hasattr(module, "bits") and "scales" in module for _, module in model.named_modules())


def _cast(model: nn.Module, dtype: mx.Dtype | None) -> None:
    """All floats; but what the model file keeps in float32 (what chooses experts, decays of states) is not narrowed."""
    if dtype is None:  # packed weights, and scales of kinds other than affine, are integers and stay
        return
    narrowed = getattr(model, "cast_predicate", lambda _: True)  # mlx-lm's own converter asks it

    def cast(name: str, x: mx.array) -> mx.array:
        kept = not mx.issubdtype(x.dtype, mx.floating) or (x.dtype == mx.float32 and not narrowed(name))
        return x if kept else x.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))


def _materialise(model: nn.Module) -> None:
    """Evaluate tensor by tensor: together, what is read and what it becomes would be in memory at once."""
    tensors: Any = tree_flatten(model.parameters())
    for _, tensor in tensors:
        mx.eval(tensor)


def _said(error: Exception, folder: Path) -> str:
    """The error on one line, without the folder before every file's name, and what can be done about it."""
    text = " ".join(str(error).replace(f"{folder}/", "").split()).rstrip(".") or type(error).__name__
    if isinstance(error, json.JSONDecodeError) and "tokenizer" not in text:
        return f"config.json is not valid JSON: {text}"
    if "required positional argument" in text:  # of the dataclass that mlx-lm reads the config into
        return "config.json lacks " + ", ".join(re.findall(r"'(\w+)'", text))
    if isinstance(error, AttributeError | TypeError | LookupError | AssertionError):  # of code, not of a reader
        text = f"its config.json is not as mlx-lm or transformers expects it ({type(error).__name__}: {text})"
    hint = "; --trust-remote-code lets that code run, if you trust it" if "trust_remote_code" in text else ""
    return clipped(text, 300) + hint
