# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent: written under another name, synced, renamed. `kill -9` leaves the last one.

A checkpoint is a folder: trained weights, optimizer state, and state.json with the position in the run, the settings
and a checksum of each file. Random numbers are functions of (seed, step): position and seed are all there is to restore.
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from .errors import UserError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


class DiskFull(Exception):
    """A checkpoint could not be written; the ones before it are untouched."""


def save(folder: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint at `folder`, atomically. Raises DiskFull with the reason when it cannot be written."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        mx.save_safetensors(str(temporary / WEIGHTS), dict(tree_flatten(model.trainable_parameters())))
        mx.save_safetensors(str(temporary / OPTIMIZER), _arrays(optimizer.state))
        sums = {name: _checksum(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        (temporary / STATE).write_text(json.dumps(state | {"files": sums}, indent=1))
        for file in temporary.iterdir():
            _sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(folder.parent).free < 1 << 20
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskFull(f"{'the disk is full' if full else error}; {folder} was not written") from error


def newest(root: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = sorted(root.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, its files proven whole; UserError naming the file that is not."""
    try:
        state = json.loads((folder / STATE).read_text())
        broken = [name for name, digest in state["files"].items() if _checksum(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        broken = [STATE]
    if broken:
        raise UserError(
            f"--resume: the checkpoint {folder} is damaged ({broken[0]}); "
            "delete that folder to go on from the one before it"
        )
    return state


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put weights and optimizer state of a checkpoint back, bit for bit."""
    model.load_weights(str(folder / WEIGHTS), strict=False)
    optimizer.state = tree_unflatten(list(mx.load(str(folder / OPTIMIZER)).items()))
    mx.eval(model.trainable_parameters(), optimizer.state)


def prune(root: Path, keep: int, spare: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and `spare`, and what a killed run left half written."""
    found = sorted(root.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    for folder in [*found[:-keep], *root.glob(".step-*.tmp")]:
        if folder != spare:
            shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """A text file that is whole or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)


def _arrays(state: Any) -> dict[str, mx.array]:
    return {name: value for name, value in tree_flatten(state) if isinstance(value, mx.array)}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
