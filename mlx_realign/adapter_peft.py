# SPDX-License-Identifier: Apache-2.0
"""PEFT adapter folders (`adapter_model.safetensors`) to and from mlx-lm's layout."""

from pathlib import Path

import mlx.nn as nn

from .adapter_files import AdapterFile
from .errors import UserError


def read_peft(folder: Path, bases: dict[str, nn.Module]) -> AdapterFile:
    raise UserError(f"{folder}: this is a PEFT adapter folder; expected an mlx-lm one with adapters.safetensors.")
