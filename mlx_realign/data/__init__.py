# SPDX-License-Identifier: Apache-2.0
"""JSONL row -> tokens and mask -> padded batch. `load` once, `plan` an epoch, `collate` each batch."""

from .batching import collate, collate_exact, plan
from .encode import key_of
from .formats import FORMATS
from .pipeline import load
from .source import has_split
from .store import Dataset
from .tokens import encode_prompt, stop_ids

__all__ = [
    "FORMATS",
    "Dataset",
    "collate",
    "collate_exact",
    "encode_prompt",
    "has_split",
    "key_of",
    "load",
    "plan",
    "stop_ids",
]
