# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: config.json, metrics.jsonl, samples.jsonl, checkpoints, the result; what may go on."""

import hashlib
import importlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from . import adapter, blas, checkpoint, locks, untrusted
from .config import TrainSettings
from .errors import UserError
from .optim import flat
from .policy import Policy

# What may differ between a run and its continuation: none of it moves a weight. Model, data and starting adapter are
# compared by content, wherever they lie.
FREE = "resume output keep save_every json report_to dry_run memory_limit wired_limit".split()
FREE += ["grad_checkpoint", "trust_remote_code"]
BY_CONTENT = {
    "model": "--model has other weights",
    "adapter": "--adapter, or the policy's own adapter, starts from other weights",
    "data": "--data has other rows, or they became other tokens",
    "eval_data": "--eval-data has other rows, or they became other tokens",
}
FULL_MODEL = "model"  # the folder, inside the output, of a fully fine-tuned model
WEIGHTS_OR_INDEX = (".safetensors", ".bin", ".gguf", ".index.json", ".pth", ".h5", ".msgpack", ".onnx")


class MetricsFile:
    """One JSON object per line, in the file as soon as it is written; also sent to a tracker where one is asked for."""

    def __init__(self, file: TextIO, tracker: Any) -> None:
        self.file, self.tracker = file, tracker

    def write(self, row: dict[str, Any]) -> None:
        """Append a row. Raises DiskFull."""
        try:
            self.file.write(as_json(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise checkpoint.DiskFull(checkpoint.cannot_write(Path(self.file.name), error)) from error
        if self.tracker:
            self.tracker.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


class RunFolder:
    """Paths and rules of one output folder."""

    def __init__(self, settings: TrainSettings, method: str, own: Any) -> None:
        self.root = Path(settings.output).expanduser()
        self.settings, self.method, self.own = settings, method, own
        self.checkpoints = self.root / "checkpoints"
        self.config, self.metrics_path = self.root / "config.json", self.root / "metrics.jsonl"
        self.samples_path = self.root / "samples.jsonl"
        self.found: Path | None = None  # the checkpoint to go on from
        self.state: dict[str, Any] = {}  # and what it says
        self.id = ""  # what checkpoints know their run by

    @contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """No other run writes here until the block ends; `check` is done. UserError where one does, and as `check`.

        Entered before the model is loaded, so that what is wrong with the folder is told at once.
        """
        with locks.only_writer(self.root) as left:
            self.check()
            if left:
                say(f"{self.root}: {left}")
            yield

    def check(self) -> None:
        """UserError where the folder cannot be used: a run in it and no --resume, or --resume and no run in it."""
        tracker_module(self.settings.report_to)
        self.found = checkpoint.newest(self.checkpoints)
        if not self.settings.resume:
            results = (self.root / checkpoint.ADAPTER, self.root / FULL_MODEL)
            begun = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
            if self.found or begun or any(result.exists() for result in results):
                raise UserError(
                    f"--output {self.root}: holds a run already; --resume goes on with it, or name another folder"
                )
        elif not self.metrics_path.exists():
            raise UserError(f"--resume: {self.root} holds no run to go on with")
        elif self.found:
            self.state = checkpoint.read_state(self.found)

    def open(self, run: dict[str, str], facts: dict[str, Any]) -> None:
        """Create the folder and write config.json; going on, hold this call against the one that began.

        run: content hashes by the names of BY_CONTENT. UserError names every difference. config.json has the settings
        as resolved, versions, the machine and what was found at load.
        """
        run = self._identity(run)
        self.id = hashlib.blake2b(json.dumps(run, sort_keys=True).encode(), digest_size=16).hexdigest()
        if self.settings.resume:
            self._refuse_difference(run)
            if self.state and self.state.get("run") != self.id:
                raise UserError(f"--resume: the checkpoint {self.found} is of another run; delete that folder")
            return
        names = ("mlx-realign", "mlx", "mlx-lm", "transformers", "numpy")
        content = {
            "method": self.method,
            "settings": asdict(self.settings),
            "method_settings": asdict(self.own),
            "facts": facts,
            "run": run,
            "versions": {name: metadata.version(name) for name in names},
            "machine": {
                "platform": platform.platform(),
                "device": str(mx.default_device()),
                "blas": blas.in_use().line(),
                **mx.device_info(),
            },
        }
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.root}: cannot be made: {error.strerror or error}") from error
        checkpoint.write_atomically(self.config, json.dumps(content, indent=1, default=str))

    def _identity(self, run: dict[str, str]) -> dict[str, Any]:
        """What a continuation must have in common with the run."""
        same = {k: v for k, v in asdict(self.settings).items() if k not in FREE and k not in BY_CONTENT}
        return json.loads(json.dumps({"method": self.method, **same, **asdict(self.own), **run}))

    def _refuse_difference(self, now: dict[str, Any]) -> None:
        try:
            before = dict(untrusted.read_json(self.config)["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume: {self.config} is missing or damaged; start again in another folder") from error
        told = [
            BY_CONTENT.get(name)
            or f"--{name.replace('_', '-')} was {as_flag(before[name])} and is now {as_flag(value)}"
            for name, value in now.items()
            if name in before and before[name] != value
        ]
        if told:
            raise UserError(
                f"--resume: the run in {self.root} was made with other data or settings: {'; '.join(told)}. "
                "Give it what it began with, or name another --output"
            )

    @contextmanager
    def metrics(self) -> Iterator[MetricsFile]:
        """metrics.jsonl, open for appending."""
        tracker = tracker_module(self.settings.report_to)
        if tracker:
            tracker.init(project="mlx-realign", name=self.root.name)
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                yield MetricsFile(file, tracker)
        finally:
            if tracker:
                tracker.finish()

    def at(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.checkpoints / f"step-{step:06d}"

    def prune(self, best: int | None, safe: int | None) -> None:
        """Delete old checkpoints, but for those of the best step and of the step to roll back to."""
        kept = [None if step is None else self.at(step) for step in (best, safe)]
        checkpoint.prune(self.checkpoints, self.settings.keep, *kept)

    def left_behind(self) -> str:
        """What a stopped run leaves."""
        newest = checkpoint.newest(self.checkpoints)
        use = "" if self.settings.full else ", which also serves as --adapter of another run"
        return f"The newest checkpoint is {newest}{use}" if newest else "There is no checkpoint yet"

    def last_row(self) -> dict[str, Any]:
        """The last row of metrics.jsonl that is of a step, or {}."""
        rows = [json.loads(line) for line in lines_of(self.metrics_path)]
        return next((row for row in reversed(rows) if "loss" in row), {})

    def keep_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append completions to samples.jsonl. Raises DiskFull."""
        try:
            with self.samples_path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # JSON's own escape
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise checkpoint.DiskFull(checkpoint.cannot_write(self.samples_path, error)) from error

    def cut(self) -> None:
        """Going on: drop the rows after the checkpoint, once that has been put back."""
        for path in (self.metrics_path, self.samples_path):
            self._cut(path, self.state.get("step", 0))

    def _cut(self, path: Path, step: int) -> None:
        """Drop rows after a step: the ones a killed run wrote after its last checkpoint, half a line included."""
        if not path.exists():
            return
        kept = []
        for line in lines_of(path):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # half a line
                continue
        checkpoint.write_atomically(path, "".join(kept))

    def write_result(self, policy: Policy) -> Path:
        """An adapter folder that mlx-lm reads as it is; with --full a model folder inside. Returns where. DiskFull."""
        target = self.root / FULL_MODEL if self.settings.full else self.root
        weights = flat(policy.model.parameters()) if self.settings.full else adapter.state(policy.model)
        try:
            if self.settings.full:
                write_model(policy, target)
            else:
                adapter.save(policy.model, target, base_model=policy.name)
                checkpoint.prove_whole(target / checkpoint.ADAPTER)
        except (OSError, RuntimeError) as error:
            raise checkpoint.DiskFull(checkpoint.cannot_write(target, error, [*weights.values()])) from error
        return target


def write_model(policy: Policy, folder: Path) -> None:
    """A Hugging Face model folder: dense weights, config.json, and tokenizer and other small files of the original."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in policy.folder.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHTS_OR_INDEX):
            shutil.copyfile(file, temporary / file.name)
    dense = {k: v for k, v in policy.config.items() if k not in ("quantization", "quantization_config")}
    dense |= {"torch_dtype": str(policy.dtype).rpartition(".")[2]}
    (temporary / "config.json").write_text(json.dumps(dense, indent=1))
    checkpoint.write_arrays(temporary / "model.safetensors", flat(policy.model.parameters()))
    for file in temporary.iterdir():
        checkpoint.sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def lines_of(path: Path) -> list[str]:
    """JSON lines, split at newlines alone: U+2028 and others that `splitlines` knows stand in strings as they are."""
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]


def as_flag(value: Any) -> str:
    """A setting as the command line has it."""
    if value is None:
        return "its default"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def as_json(row: dict[str, Any]) -> str:
    """One line; a number that is not finite, which JSON has no word for, becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False)


def tracker_module(name: str) -> Any:
    """The library of --report-to, or None. UserError where it is not installed."""
    try:
        return None if name == "none" else importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--report-to {name}: not installed; pip install {name}") from error
