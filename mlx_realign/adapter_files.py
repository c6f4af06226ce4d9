# SPDX-License-Identifier: Apache-2.0
"""Adapter folders on disk: what mlx-lm writes and reads (`adapters.safetensors`, `adapter_config.json`)."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from . import untrusted
from .errors import UserError

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
LARGEST = 1e9  # any rank, alpha or scale is smaller


class AdapterFile(NamedTuple):
    """An adapter as read, in mlx-lm's layout, before it meets a model."""

    folder: Path
    tensors: dict[str, mx.array]  # "model.layers.0.self_attn.q_proj.lora_a" -> array
    rank: int
    scale: float  # the multiplier of A B itself: alpha / rank, or alpha / sqrt(rank)
    dropout: float
    dora: bool
    config: dict[str, Any]  # the JSON as it was

    def modules(self) -> dict[str, dict[str, mx.array]]:
        """Path of the adapted module -> its arrays by leaf name."""
        grouped: dict[str, dict[str, mx.array]] = {}
        for name, tensor in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            grouped.setdefault(path, {})[leaf] = tensor
        return grouped


def read_mlx(folder: Path, most: int | None = None) -> AdapterFile:
    """Read an mlx-lm adapter folder of at most so many tensors.

    Raises UserError for a missing, broken or full fine-tune folder.
    """
    config = read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(
            f"{folder / CONFIG}: fine_tune_type is {kind!r}, expected 'lora' or 'dora'. "
            "Weights of a full fine-tune are a model, not an adapter: give their folder as --model."
        )
    parameters = config.get("lora_parameters") or {}
    parameters = parameters if isinstance(parameters, dict) else {}
    missing = [key for key in ("rank", "scale", "dropout") if key not in parameters]
    if missing:
        raise UserError(
            f"{folder / CONFIG}: lora_parameters lacks {', '.join(missing)} "
            "(expected rank, scale and dropout, as mlx-lm writes them). Save the adapter again or write the keys in."
        )
    rank, scale, dropout = (number(folder, parameters, key) for key in ("rank", "scale", "dropout"))
    if rank < 1 or rank != int(rank) or not 0 <= dropout < 1:
        raise UserError(
            f"{folder / CONFIG}: rank is {rank:g} and dropout {dropout:g}, expected a whole number from 1 on, and one "
            "from 0 to below 1."
        )
    return AdapterFile(folder, read_tensors(folder / WEIGHTS, most), int(rank), scale, dropout, kind == "dora", config)


def number(folder: Path, values: dict[str, Any], key: str) -> float:
    """values[key] as a float; UserError names file and key where it is none."""
    found = values[key]
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= LARGEST:
        raise UserError(f"{folder / CONFIG}: {key} is {found!r}, expected a number.")
    return float(found)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dict; UserError where folder or file are missing or the JSON is broken."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder. Expected a folder with {CONFIG}, from mlx-lm or PEFT.")
    path = folder / CONFIG
    try:
        config = untrusted.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing. An adapter folder holds {CONFIG} beside its weights.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Copy the adapter again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config


def read_tensors(path: Path, most: int | None = None) -> dict[str, mx.array]:
    """All arrays of a safetensors file; UserError where it is missing, not a whole one, or has more than `most`."""
    if not path.exists():
        raise UserError(f"{path}: missing. The folder has {CONFIG} but no weights: copy the adapter again.")
    try:
        untrusted.safetensors_header(path, most)
        tensors = mx.load(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}). Copy or save the adapter again.") from None
    assert isinstance(tensors, dict)
    if not tensors:
        raise UserError(f"{path}: holds no tensors. Save the adapter again.")
    return tensors


def write_folder(folder: Path, weights: str, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Write weights and adapter_config.json; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{weights}.{os.getpid()}.safetensors"  # mx.save_safetensors insists on the ending
    mx.save_safetensors(str(part), tensors, metadata={"format": "mlx"})
    os.replace(part, folder / weights)
    part = folder / f".{CONFIG}.{os.getpid()}"
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / CONFIG)
