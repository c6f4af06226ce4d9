# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent: written under another name, synced, renamed. `kill -9` leaves the last one.

A checkpoint is a folder: the adapter as mlx-lm reads it (with full fine-tuning weights.safetensors), the optimizer's
arrays, and state.json with the position in the run, the run it is of, and a checksum of each file and of itself. Random
numbers are functions of the seed and the position, so these are all there is to restore.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import adapter, untrusted
from .errors import UserError
from .optim import Updater, flat

ADAPTER, WEIGHTS = "adapters.safetensors", "weights.safetensors"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
STATE_BYTES = 1 << 30  # micro-batches that were generated and wait are in it


class DiskFull(Exception):
    """Something could not be written; the message says what and why, and what was written before is untouched."""


def save(folder: Path, model: nn.Module, optimizer: Updater, state: dict[str, Any], *, base_model: str) -> None:
    """Write a checkpoint at `folder`, whole or not at all. Raises DiskFull with the reason when it cannot be."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    arrays, weights = optimizer.state(), flat(model.trainable_parameters())
    try:
        temporary.mkdir(parents=True)
        if adapter.adapters_of(model):
            adapter.save(model, temporary, base_model=base_model)
            prove_whole(temporary / ADAPTER)
        else:
            write_arrays(temporary / WEIGHTS, weights)
        write_arrays(temporary / OPTIMIZER, arrays)
        sums = {file.name: _checksum(file) for file in sorted(temporary.iterdir())}
        state = json.loads(json.dumps(state | {"files": sums}))  # as it will be read
        (temporary / STATE).write_text(json.dumps(state | {"checksum": _own_checksum(state)}, indent=1))
        for file in temporary.iterdir():
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskFull(cannot_write(folder, error, [*arrays.values(), *weights.values()])) from error


def newest(root: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return next(iter(reversed(_steps(root))), None)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, its files proven whole; UserError naming the file that is not."""
    state: dict[str, Any] = {}
    try:
        state = untrusted.read_json(folder / STATE, most=STATE_BYTES)
        broken = [STATE] if state.pop("checksum") != _own_checksum(state) else []
        broken += [name for name in state["files"] if Path(name).name != name]  # files of other folders
        broken += [name for name, digest in state["files"].items() if not broken and _checksum(folder / name) != digest]
        if not broken and state["step"] != int(folder.name.rpartition("-")[2]):
            broken = [f"it says that it is of step {state['step']}"]
    except FileNotFoundError as error:
        broken = [f"{Path(error.filename).name} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        broken = [STATE]
    if broken:
        raise UserError(
            f"--resume: the checkpoint {folder} is damaged ({broken[0]}); "
            "delete that folder to go on from the one before it"
        )
    return state


@contextmanager
def within(folder: Path, state: dict[str, Any], steps: int) -> Iterator[dict[str, Any]]:
    """Inside, the run takes up `state`; UserError where it is of a step that the run does not have, or lacks things."""
    if state["step"] > steps:
        raise UserError(f"--resume: the checkpoint {folder} is of step {state['step']}, and this run ends with {steps}")
    try:
        yield state
    except (KeyError, TypeError, ValueError, IndexError) as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--resume: {folder / STATE} is not what this version writes ({told}); delete {folder}"
        ) from error


def restore(folder: Path, model: nn.Module, optimizer: Updater | None) -> None:
    """Put weights (and optimizer state) of a checkpoint back, bit for bit. UserError, and nothing is changed, where it
    is of another model or optimizer, or holds NaN.
    """
    path = folder / (ADAPTER if (folder / ADAPTER).exists() else WEIGHTS)
    if not path.exists():
        raise UserError(f"the checkpoint {folder}, which the run would go back to, is gone")
    weights = load_arrays(path)
    if not _alike(weights, adapter.state(model) or flat(model.trainable_parameters())):
        raise UserError(f"--resume: the checkpoint {folder} is of another model or adapter")
    if broken := [name for name, value in weights.items() if not mx.isfinite(value).all()]:
        raise UserError(
            f"--resume: the checkpoint {folder} holds something other than finite numbers in {broken[0]}; "
            "delete that folder to go on from the one before it"
        )
    moments = load_arrays(folder / OPTIMIZER) if optimizer else {}
    if optimizer and not _alike(moments, optimizer.state()):
        raise UserError(f"--resume: {folder / OPTIMIZER} is of another optimizer or adapter; delete {folder}")
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters())
    if optimizer:
        optimizer.restore(moments)


def prune(root: Path, keep: int, best: Path | None = None, safe: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, the best one and the one to roll back to.

    What a killed run left half written goes as well.
    """
    for folder in [*_steps(root)[:-keep], *root.glob(".step-*.tmp")]:
        if folder not in (best, safe):
            shutil.rmtree(folder, ignore_errors=True)


def write_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """A safetensors file. OSError or RuntimeError where it could not be written in full."""
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    prove_whole(path)


def prove_whole(path: Path) -> None:
    """OSError where a safetensors file is shorter than its own header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if 8 + length <= size else {}
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise OSError(f"{path.name} has {size} bytes where {expected} were written")


def load_arrays(path: Path) -> dict[str, mx.array]:
    """All arrays of a safetensors file; UserError where it is none."""
    try:
        untrusted.safetensors_header(path)
        arrays = mx.load(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume: {path} cannot be read ({error}); delete its folder to go on without it") from None
    assert isinstance(arrays, dict)
    return arrays


def _alike(found: dict[str, mx.array], wanted: dict[str, mx.array]) -> bool:
    """Whether names, shapes and dtypes are the same."""
    facts = [{name: (value.shape, value.dtype) for name, value in side.items()} for side in (found, wanted)]
    return facts[0] == facts[1]


def write_atomically(path: Path, text: str) -> None:
    """A text file that is whole or as it was before. Raises DiskFull when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DiskFull(cannot_write(path, error)) from error


def cannot_write(path: Path, error: Exception, arrays: Sequence[mx.array] = ()) -> str:
    """One sentence on why `path` was not written; MLX's writer does not say that the disk is full, so it is asked."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(there).free, sum(value.nbytes for value in arrays)
    if getattr(error, "errno", None) == errno.ENOSPC or free < max(needed, 1 << 20):
        room = f"{free / 1e6:.1f} MB free, {needed / 1e6:.1f} MB needed"
        return f"{path} cannot be written: the disk is full ({room}); make room"
    return f"{path} cannot be written: {error}"


def sync(path: Path) -> None:
    """Have the system put a file or folder on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(root: Path) -> list[Path]:
    """Checkpoints in the order of their steps."""
    found = [folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def _own_checksum(state: dict[str, Any]) -> str:
    """Of what state.json says, its own checksum aside."""
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checksum(path: Path) -> str:
    untrusted.require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
