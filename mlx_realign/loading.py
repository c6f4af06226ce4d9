# SPDX-License-Identifier: Apache-2.0
"""From a name to a model in memory: local folder, hub id or the embedded tiny-chat, in a dtype to suit the device."""

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import UserError

EMBEDDED = "tiny-chat"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
GROUP_SIZE = 64


class Loaded(NamedTuple):
    """A model with what was done to it on the way in."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    folder: Path
    notes: list[str]


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
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"--model {name}: {folder} has no model*.safetensors; convert the weights to safetensors first")
    return folder


def load(
    name: str,
    *,
    dtype: str = "auto",
    quantize: int | None = None,
    cpu_dequantize: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Weights lazily mapped, cast and quantised one tensor at a time, held once. See TrainSettings for the options."""
    folder = find_model(name)
    try:
        model, config = mlx_lm_utils.load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
        tokenizer = mlx_lm_utils.load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except UserError:
        raise
    except Exception as error:  # whatever a broken folder makes the readers raise, the user gets one line
        hint = " (pass --trust-remote-code if you trust it)" if "trust_remote_code" in str(error) else ""
        raise UserError(f"--model {name}: cannot be loaded from {folder}: {_first_line(error)}{hint}") from error
    notes: list[str] = []
    if quantize and not config.get("quantization"):
        nn.quantize(model, group_size=GROUP_SIZE, bits=quantize, class_predicate=_quantizable)
        notes.append(f"base quantised to {quantize} bits, groups of {GROUP_SIZE}")
    if on_cpu() and cpu_dequantize == "auto" and _has_quantized(model):
        mlx_lm_utils.dequantize_model(model)
        notes.append("quantised weights dequantised to float32: matmuls on packed weights are 30 times slower on a CPU")
    _cast(model, DTYPES["float32"] if dtype == "auto" and on_cpu() else DTYPES.get(dtype))
    model.eval()
    mx.eval(model.parameters())
    return Loaded(model, tokenizer, config, folder, notes)


def _fetch(name: str) -> Path:
    try:
        return Path(mlx_lm_utils._download(name))
    except Exception as error:
        raise UserError(
            f"--model {name}: not on this machine and the hub cannot be reached or does not have it "
            f"({_first_line(error)}); give a local folder or connect once to fetch it"
        ) from error


def _quantizable(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0


def _has_quantized(model: nn.Module) -> bool:
    return any(hasattr(module, "bits") and "scales" in module for _, module in model.named_modules())


def _cast(model: nn.Module, dtype: mx.Dtype | None) -> None:
    if dtype is None:
        return
    keep = {f"{path}.{k}" for path, m in model.named_modules() if hasattr(m, "bits") for k in ("scales", "biases")}
    floating = lambda path, x: mx.issubdtype(x.dtype, mx.floating) and (path not in keep or x.dtype != mx.uint8)  # noqa: E731
    model.update(tree_map_with_path(lambda path, x: x.astype(dtype) if floating(path, x) else x, model.parameters()))


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
