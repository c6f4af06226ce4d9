# SPDX-License-Identifier: Apache-2.0
"""What the parts of `mac.py` share: how much to do, one result that is saved after every measurement, and processes.

The result holds for each part a list of entries. An entry has `of` (what was measured, a dict), `command`, `status`
(done, failed, left out, interrupted), `reason` (null where done), `seconds` and `found` (null where not done): every
number stands beside the command that gave it. Standard library only: it runs before anything is installed.
"""

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "mlx_realign/assets/tiny-chat"
LOG_LINES = 12
LIMIT_S = 1800.0  # of one measurement: a machine that swaps may take for ever
WEIGHTS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

FETCH = """
import glob, sys
from huggingface_hub import snapshot_download
name, folder, *wanted = sys.argv[1:]
try:
    own = snapshot_download(name, local_files_only=True, allow_patterns=wanted)
except Exception:
    own = ""
whole = own and glob.glob(own + "/*.safetensors") and glob.glob(own + "/tokenizer*")
print(own if whole else snapshot_download(name, cache_dir=folder, allow_patterns=wanted))
"""


@dataclass(frozen=True)
class Model:
    """A model of the hub: its names, the first that is there is taken, and the GB that it downloads."""

    names: tuple[str, ...]
    download_gb: float

    @property
    def short(self) -> str:
        """Its name without an owner."""
        return self.names[0].rpartition("/")[2]


# Names and sizes as on the hub in November 2026. Qwen3.5's files hold its image tower too.
SMOLLM2 = Model(("mlx-community/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), 0.27)
QWEN3 = Model(("mlx-community/Qwen3-0.6B-4bit",), 0.35)
QWEN35 = Model(("mlx-community/Qwen3.5-0.8B-MLX-4bit", "mlx-community/Qwen3.5-0.8B-4bit"), 0.65)
GEMMA3 = Model(("mlx-community/gemma-3-270m-it-4bit", "mlx-community/gemma-3-270m-it-qat-4bit"), 0.19)
LLAMA32 = Model(("mlx-community/Llama-3.2-1B-Instruct-4bit",), 0.71)
QWEN3_8B = Model(("mlx-community/Qwen3-8B-4bit",), 4.6)
EMBEDDED = Model((str(TINY),), 0.0)


@dataclass(frozen=True)
class Size:
    """How much is done."""

    parts: tuple[str, ...]
    checked: tuple[Model, ...]  # of part `checks`
    model: Model  # of the parts that train
    tests: tuple[str, ...]  # arguments of pytest; none: the whole suite
    lengths: tuple[int, ...]  # tokens of a row, part `memory`
    steps: int
    rounds: int
    cool_s: float  # between runs that are compared
    traced_steps: int
    steady_s: float
    limits_tokens: int
    downloads: bool  # of models


PARTS = ("setup", "tests", "checks", "peers", "memory", "traces", "steady", "limits")
QUICK_TESTS = ("tests/test_kernels.py", "tests/test_gated_delta.py", "tests/test_losses.py", "tests/test_exact.py")
SIZES = {
    "full": Size(PARTS, (SMOLLM2, QWEN3, QWEN35, GEMMA3, LLAMA32), QWEN3, (), (512, 1024, 2048, 4096, 8192), 8, 2, 30,
                 100, 600, 2048, True),
    "short": Size(("setup", "tests", "checks", "traces", "limits"), (EMBEDDED,), EMBEDDED, QUICK_TESTS, (128, 256, 512),
                  6, 1, 1, 100, 30, 512, False),
    "small": Size(PARTS, (EMBEDDED,), EMBEDDED, QUICK_TESTS[:1], (64, 128, 256), 4, 2, 0, 30, 8, 256, False),
}  # fmt: skip


class Missing(Exception):
    """Something that a measurement needs is not there; the message says what."""


class Job:
    """The result, where it is kept, and the processes that fill it."""

    def __init__(self, folder: Path, kind: str, size: Size, *, python: Path | None = None, large: bool = False) -> None:
        self.folder, self.kind, self.size, self.large = folder, kind, size, large
        self.work, self.path = folder / "work", folder / "result.json"
        self.given = python
        self.part = ""
        self.result: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "parts": {}}

    @property
    def python(self) -> Path:
        """The interpreter of the environment that this package is installed in."""
        return self.given or self.work / "venv/bin/python"

    def save(self) -> None:
        """The result to its file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Those of the part that is under way."""
        return self.result["parts"][self.part]["entries"]

    def entry(self, of: Mapping[str, Any], part: str = "") -> dict[str, Any] | None:
        """What was measured of it until now."""
        entries = self.result["parts"].get(part or self.part, {"entries": []})["entries"]
        return next((entry for entry in entries if entry["of"] == dict(of)), None)

    def note(self, of: Mapping[str, Any], status: str, reason: str | None, **more: Any) -> dict[str, Any]:
        """An entry in the place of an earlier one of the same."""
        known = self.entry(of)
        made = {"of": dict(of), "status": status, "reason": reason, "command": None, "seconds": None, "found": None}
        made |= json.loads(clean(json.dumps(more, ensure_ascii=False), self.work))
        made["reason"] = reason and clean(reason, self.work)
        if known is None:
            self.entries.append(made)
        else:
            self.entries[self.entries.index(known)] = made
        self.save()
        return made

    def leave_out(self, of: Mapping[str, Any], reason: str, **more: Any) -> None:
        """It is not measured, for this reason."""
        say(f"  {named(of)}: left out, {reason}")
        self.note(of, "left out", reason, **more)

    def measure(
        self,
        of: Mapping[str, Any],
        command: Sequence[Any],
        read: Callable[[str, float], dict[str, Any]],
        *,
        environment: Mapping[str, str] | None = None,
        limit: float = LIMIT_S,
        watch: Callable[[int], None] = lambda pid: None,
        ended: bool = False,
        again: bool = False,
    ) -> dict[str, Any] | None:
        """Run a command once, unless an earlier run of this program did; what `read` makes of its output and its
        largest resident set (GB), or None where it failed, which is noted. `ended`: to be stopped at its limit is
        how it ends. `again`: run it whatever is known."""
        known = self.entry(of)
        if known and known["status"] == "done" and not again:
            say(f"  {named(of)}: known from an earlier run")
            return known["found"]
        words, started = [str(word) for word in command], time.perf_counter()
        facts: dict[str, Any] = {"command": shown(words, environment)}
        say(f"  {named(of)} ...")
        try:
            try:
                given = self.environment() | dict(environment or {})
                text, _, maxrss = launch.run(words, given, limit=limit, watch=watch)
            except launch.Late:
                if not ended:
                    raise
                text, maxrss = "", 0.0
            found = read(text, maxrss)
        except KeyboardInterrupt:
            self.note(of, "interrupted", "ended from outside while it ran", **facts)
            raise
        except (launch.Failed, OSError, ValueError, LookupError, Missing) as error:
            lines = clean(str(error), self.work).splitlines() or [type(error).__name__]
            told = lines[-1] if isinstance(error, launch.Failed | Missing) else f"{type(error).__name__}: {lines[-1]}"
            log = {"log": lines[1:-1][-LOG_LINES:]} if isinstance(error, launch.Failed) else {}
            say(f"  {named(of)}: {told}")
            self.note(of, "failed", told, **facts, **log, seconds=round(time.perf_counter() - started, 1))
            return None
        self.note(of, "done", None, **facts, seconds=round(time.perf_counter() - started, 1), found=found)
        return found

    def environment(self) -> dict[str, str]:
        """Of every process: nothing is written outside the folder, no network but where it is asked for."""
        own = {"MLX_REALIGN_CACHE": str(self.work / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        own |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
        return own | {"HF_DATASETS_CACHE": str(self.work / "cache/datasets")}

    @property
    def scratch(self) -> Path:
        """A folder for what a process leaves."""
        (self.work / "tmp").mkdir(parents=True, exist_ok=True)
        return self.work / "tmp"

    def train(
        self,
        of: Mapping[str, Any],
        flags: Sequence[Any],
        read: Callable[[list[dict[str, Any]], float], dict[str, Any]],
        **options: Any,
    ) -> dict[str, Any] | None:
        """`measure` of a training run; `read` gets the rows of its metrics.jsonl. `watch` gets its file as well."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            output = Path(folder) / "output"
            metrics = output / "metrics.jsonl"
            fixed = ["--lr-schedule", "constant", "--save-every", 100000, "--kl-every", 0, "--json"]
            command = [self.python, "-m", "mlx_realign.train", *flags, *fixed, "--output", output]
            watch = options.pop("watch", None)
            if watch:
                options["watch"] = lambda pid: watch(pid, metrics)
            return self.measure(of, command, lambda _, maxrss: read(steps_in(metrics), maxrss), **options)

    def dry_run(self, of: Mapping[str, Any], flags: Sequence[Any]) -> dict[str, Any] | None:
        """`measure` of `mlx-realign train --dry-run --json`: all it tells, and its sentences as `notes`."""
        command = [self.python, "-m", "mlx_realign.train", *flags, "--dry-run", "--json"]
        return self.measure(of, command, lambda text, _: told(text))

    def model(self, wanted: Model) -> Path:
        """The folder of a model: the user's own copy, or one downloaded into the work folder. Missing says why none."""
        reasons: dict[str, list[str]] = {}  # why -> which
        for name in wanted.names:
            if (folder := Path(name).expanduser()).is_dir():
                return folder
            if not self.size.downloads:
                raise Missing(f"{name}: no such folder, and --{self.kind} downloads no models")
            say(f"  {name}: looking for it, downloading up to {wanted.download_gb:g} GB")
            command = [self.python, "-c", FETCH, name, self.work / "hub", *WEIGHTS]
            try:
                text, _, _ = launch.run(command, self.environment() | {"HF_HUB_OFFLINE": "0"})
                folder = Path(text.strip().splitlines()[-1])
                if next(folder.glob("*.safetensors"), None):
                    return folder
                why = "it holds no weights"
            except launch.Failed as error:
                why = str(error).splitlines()[-1]
            reasons.setdefault(why, []).append(name)
        raise Missing("; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items()))

    def texts(self, model: Path, *flags: Any) -> Path:
        """The folder of rows that mac_texts.py makes for a model."""
        key = re.sub(r"\W+", "-", f"{model.parent.name}-{model.name} {' '.join(map(str, flags))}")
        folder = self.work / "texts" / key.strip("-")
        if not (folder / "lengths.json").exists():
            maker = Path(__file__).parent / "mac_texts.py"
            launch.run([self.python, maker, model, folder, *map(str, flags)], self.environment())
        return folder

    def clear(self) -> None:
        """All that was made but for the result."""
        shutil.rmtree(self.work, ignore_errors=True)


def steps_in(metrics: Path) -> list[dict[str, Any]]:
    """Rows of optimizer steps; ValueError where there is none."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    rows = [row for row in map(json.loads, filter(str.strip, lines)) if "step_s" in row]
    if not rows:
        raise ValueError("no step was made")
    return rows


def told(text: str) -> dict[str, Any]:
    """The last JSON object of a command's output, with the messages before it as `notes`."""
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if not rows:
        raise ValueError("nothing was told")
    return {**rows[-1], "notes": [row["message"] for row in rows[:-1] if "message" in row]}


def shown(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A command as one would type it."""
    return " ".join([*(f"{k}={v}" for k, v in (environment or {}).items()), *map(shlex.quote, words)])


def clean(text: str, work: Path) -> str:
    """Without the folders of this machine, which may hold its user's name."""
    for path, name in ((work, "WORK"), (ROOT, "."), (Path(sys.prefix), "PYTHON"), (Path.home(), "~")):
        for spelling in {str(path), str(path.resolve())}:
            text = text.replace(spelling, name)
    user = os.environ.get("USER", "")
    return re.sub(rf"\b{re.escape(user)}\b", "USER", text) if len(user) > 2 and user != "root" else text


def named(of: Mapping[str, Any]) -> str:
    """A measurement in a few words."""
    return ", ".join(str(v) if isinstance(v, str) else k if v is True else f"{v:g} {k}" for k, v in of.items() if v)


def say(text: str) -> None:
    """A line at once; where the terminal is gone, the result is what counts."""
    with suppress(OSError):
        print(text, flush=True)
