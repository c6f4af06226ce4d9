# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: config.json, metrics.jsonl, checkpoints, the adapter; and what may go on in it."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx
from mlx.utils import tree_flatten

from . import adapter, checkpoint
from .config import TrainSettings
from .errors import UserError
from .policy import Policy

# What may differ between a run and its continuation: none of it moves a weight.
FREE = {
    "resume",
    "output",
    "keep",
    "save_every",
    "json",
    "report_to",
    "dry_run",
    "memory_limit",
    "grad_checkpoint",
    "data",
}


class MetricsFile:
    """One JSON object per line, on disk as soon as it is written; also sent to a tracker where one is asked for."""

    def __init__(self, file: TextIO, tracker: Any) -> None:
        self.file, self.tracker = file, tracker

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise checkpoint.DiskFull(f"metrics.jsonl cannot be written ({error})") from error
        if self.tracker:
            self.tracker.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


class RunFolder:
    """Paths and rules of one output folder."""

    def __init__(self, root: Path, settings: TrainSettings, method: str, own: Any) -> None:
        self.root, self.settings, self.method, self.own = root, settings, method, own
        self.checkpoints = root / "checkpoints"
        self.config, self.metrics_path = root / "config.json", root / "metrics.jsonl"

    def refuse_other_run(self) -> None:
        """UserError where the folder holds a run and this is no continuation, or there is nothing to go on from."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--output {self.root}: is a file; name a folder")
        if self.metrics_path.exists() and not self.settings.resume:
            raise UserError(
                f"--output {self.root}: holds a run already; --resume goes on with it, or name another folder"
            )
        if self.settings.resume and not self.metrics_path.exists():
            raise UserError(f"--resume: {self.root} holds no run to go on with")
        if self.settings.resume and (newest := checkpoint.newest(self.checkpoints)):
            checkpoint.read_state(newest)  # a damaged one is refused before the model is loaded

    def open(self, facts: dict[str, Any]) -> None:
        """Create the folder and write config.json: settings as resolved, versions, machine, what was found at load."""
        self.root.mkdir(parents=True, exist_ok=True)
        versions = {name: metadata.version(name) for name in ("mlx-realign", "mlx", "mlx-lm", "transformers", "numpy")}
        machine = {"platform": platform.platform(), "device": str(mx.default_device()), **_plain(mx.device_info())}
        content = {
            "method": self.method,
            "settings": asdict(self.settings),
            "method_settings": asdict(self.own),
            "facts": facts,
            "versions": versions,
            "machine": machine,
        }
        checkpoint.write_atomically(self.config, json.dumps(content, indent=1, default=str))

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """What a continuation must have in common with the run."""
        same = {name: value for name, value in asdict(self.settings).items() if name not in FREE}
        return {"method": self.method, "data": fingerprint, **same, **asdict(self.own)}

    def refuse_difference(self, before: dict[str, Any], fingerprint: str) -> None:
        """UserError naming every setting in which this call differs from the run it wants to go on with."""
        now = json.loads(json.dumps(self.identity(fingerprint)))
        told = [
            f"{name.replace('_', '-')} was {before.get(name)}, now {now.get(name)}"
            for name in now
            if before.get(name) != now[name]
        ]
        if told:
            raise UserError(f"--resume: {self.root} was made with other data or settings: {'; '.join(told)}")

    @contextmanager
    def metrics(self) -> Iterator[MetricsFile]:
        """metrics.jsonl, open for appending."""
        tracker = _tracker(self.settings.report_to, self.root.name)
        with self.metrics_path.open("a") as file:
            yield MetricsFile(file, tracker)
        if tracker:
            tracker.finish()

    def cut_metrics(self, step: int) -> None:
        """Drop rows after a step: the ones a killed run wrote after its last checkpoint, half a line included."""
        kept = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue
        checkpoint.write_atomically(self.metrics_path, "".join(line + "\n" for line in kept))

    def write_weights(self, policy: Policy) -> None:
        """The result: an adapter folder that mlx-lm reads as it is, or with --full the whole model."""
        try:
            if self.settings.full:
                weights = dict(tree_flatten(policy.model.parameters()))
                mx.save_safetensors(str(self.root / "model.safetensors"), weights, metadata={"format": "mlx"})
                (self.root / "model_config.json").write_text(json.dumps(policy.config, indent=1))
            else:
                adapter.save(policy.model, self.root, base_model=policy.name)
        except (OSError, RuntimeError) as error:
            raise checkpoint.DiskFull(f"the result cannot be written to {self.root} ({error})") from error


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if isinstance(value, str | int | float)}


def _tracker(name: str, run: str) -> Any:
    if name == "none":
        return None
    from importlib import import_module

    try:
        library = import_module(name)
    except ImportError as error:
        raise UserError(f"--report-to {name}: not installed; pip install {name}") from error
    library.init(project="mlx-realign", name=run)
    return library
