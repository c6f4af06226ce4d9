# SPDX-License-Identifier: Apache-2.0
"""A hub dataset as a local JSONL file: its own .jsonl if it has one, else through the `datasets` library."""

import json
import os
from pathlib import Path
from typing import Any

from ..cache import cache_dir
from ..errors import UserError
from .source import SPLITS


def fetch(name: str, split: str) -> Path:
    """The JSONL file of one split of `owner/name` or `owner/name:config`. UserError where it cannot be had."""
    repo, _, config = name.partition(":")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    names = [f"{folder}{file}" for file in SPLITS.get(split, (f"{split}.jsonl",)) for folder in ("", "data/")]
    for file in [] if config else names:
        cached = try_to_load_from_cache(repo, file, repo_type="dataset")
        if isinstance(cached, str):
            return Path(cached)
    try:
        there = {file.rfilename for file in HfApi().dataset_info(repo, timeout=10).siblings or []}
        for file in [] if config else names:
            if file in there:
                return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except Exception as error:  # offline, no such dataset, gated: one message for all
        raise UserError(
            f"{name}: no such file or folder, and no hub dataset of this name can be read ({_short(error)}). "
            "Check the path, or the network and `hf auth login`."
        ) from error
    return _through_datasets(repo, config, split)


def _through_datasets(repo: str, config: str, split: str) -> Path:
    """Parquet, CSV and the rest: written once as JSONL beside the tokenised data."""
    target = cache_dir() / "hub" / f"{repo.replace('/', '--')}-{config or 'default'}-{split}.jsonl"
    if target.is_file():
        return target
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{repo} has no {SPLITS.get(split, (split,))[0]}; reading its other files needs `pip install datasets`"
        ) from error
    names = {"valid": ["validation", "valid", "val", "dev"]}.get(split, [split])
    failure: Any = None
    for part in names:
        try:
            rows = load_dataset(repo, config or None, split=part, streaming=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_suffix(f".{os.getpid()}")
            with open(draft, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({k: v for k, v in row.items() if v is not None}, default=str) + "\n")
            os.replace(draft, target)
            return target
        except Exception as error:  # the library raises many kinds
            failure = failure or error
    raise UserError(f"{repo}: split {split!r} cannot be read ({_short(failure)}); owner/name:config picks a config")


def _short(error: Any) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
