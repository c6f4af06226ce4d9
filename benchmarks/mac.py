# SPDX-License-Identifier: Apache-2.0
"""Measures mlx-realign on a Mac and writes one file to send back. It says what it will do, and asks, before it starts.

    sh benchmarks/mac.sh                        # all of it; --yes does not ask
    sh benchmarks/mac.sh --only tests,memory    # some parts; --skip leaves parts out
    sh benchmarks/mac.sh --short                # ten minutes, no models downloaded

The result is REPORT/result.json, with REPORT/result.md to read or to paste. It holds the chip, versions and numbers;
no name, path or serial number. Ctrl-C ends it and keeps what was measured; the same command goes on from there, and
tries again what failed. Everything else it makes lies in REPORT/work, which goes when all is done.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import mac_checks
import mac_facts
import mac_memory
import mac_page
import mac_peers
from mac_job import PARTS, ROOT, SCHEMA, SIZES, Job, Missing, Model, clean, say


class Part(NamedTuple):
    """One of the things that are done."""

    about: str
    run: Callable[[Job], None]
    minutes: tuple[float, float, float]  # full, short, small; roughly, on an M-series machine
    models: Callable[[Job], tuple[Model, ...]] = lambda job: (job.size.model,)
    packages_gb: float = 0.0


def of_rows(job: Job) -> tuple[Model, ...]:
    """The models of the published runs that are repeated."""
    return tuple(row.model for row in mac_peers.ROWS if not mac_peers.refused(job, row))


def none(_: Job) -> tuple[Model, ...]:
    """No models."""
    return ()


DONE_BY = {
    "setup": Part("an environment of its own, and what this machine is", mac_facts.setup, (5, 1, 3), none, 0.6),
    "tests": Part("the test suite on the GPU", mac_facts.tests, (25, 3, 1), none),
    "checks": Part("self-checks and estimates of models", mac_checks.checks, (8, 1, 1), lambda job: job.size.checked),
    "peers": Part("published runs, ours beside others'", mac_peers.compare, (45, 0, 1), of_rows, 1.5),
    "memory": Part("peak memory by length of a row, and the plan's", mac_memory.memory, (20, 0, 1)),
    "traces": Part("shapes that are compiled, resident memory", mac_checks.traces, (6, 3, 1)),
    "steady": Part("one run long enough to get warm", mac_memory.steady, (11, 0, 1)),
    "limits": Part("the same within what 8 and 16 GB machines give", mac_checks.limits, (6, 1, 1)),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with 2 for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--short", action="store_true", help="under ten minutes, no models downloaded")
    kinds.add_argument("--small", action="store_true", help="a trial of this program, on any machine")
    parser.add_argument("--only", default="", metavar="PARTS", help="comma-separated: " + ", ".join(PARTS))
    parser.add_argument("--skip", default="", metavar="PARTS", help="comma-separated")
    parser.add_argument("--large", action="store_true", help="also the runs of an 8B model (4.6 GB, an hour more)")
    parser.add_argument("--model", help="hub id or folder for the parts memory, traces, steady, limits")
    parser.add_argument("--models", help="comma-separated hub ids or folders for the part checks")
    parser.add_argument("--output", type=Path, default=Path("mac-report"), metavar="REPORT")
    parser.add_argument("--python", type=Path, help="of an environment that has this package and its extra dev")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--keep", action="store_true", help="keep REPORT/work at the end")
    a = parser.parse_args(argv)
    a.kind = "short" if a.short else "small" if a.small else "full"
    for flag in ("only", "skip"):
        names = [name for name in getattr(a, flag).split(",") if name]
        setattr(a, flag, names)
        if unknown := [name for name in names if name not in PARTS]:
            parser.error(f"--{flag}: no part {unknown[0]}; there are {', '.join(PARTS)}")
    return a


def job_of(a: argparse.Namespace) -> Job:
    """The job that the flags ask for; Missing where an earlier result is another machine's or commit's."""
    size = SIZES[a.kind]
    if a.model:
        size = dataclasses.replace(size, model=own(a.model))
    if a.models:
        size = dataclasses.replace(size, checked=tuple(map(own, a.models.split(","))))
    python = a.python and a.python.absolute()
    job = Job(a.output.absolute(), a.kind, size, python=python, large=a.large)
    head = {"schema": SCHEMA, "kind": a.kind, **mac_facts.commit()}
    job.result = {**head, "began": now(), "ended": None, "ended_by": None, "parts": {}}
    if job.path.exists():
        known = json.loads(job.path.read_text(encoding="utf-8"))
        if {key: known.get(key) for key in head} != head:
            raise Missing(f"{a.output}/result.json is of another commit or kind of run: take another --output")
        job.result = known | {"ended": None, "ended_by": None}
    return job


def own(name: str) -> Model:
    """A model that the user names."""
    return Model((str(Path(name).absolute()) if Path(name).is_dir() else name,), 0.0)


def chosen(a: argparse.Namespace) -> list[str]:
    """The parts to do; the first always is one of them."""
    wanted = a.only or SIZES[a.kind].parts
    return [name for name in PARTS if name == "setup" or name in wanted and name not in a.skip]


def told(job: Job, names: list[str], output: Path) -> str:
    """What will be done, how long it takes, what it downloads."""
    column = list(SIZES).index(job.kind)
    lines = [f"  {name:<7} {DONE_BY[name].about}; about {DONE_BY[name].minutes[column]:g} min" for name in names]
    minutes = sum(DONE_BY[name].minutes[column] for name in names)
    models = {model for name in names for model in DONE_BY[name].models(job)} if job.size.downloads else set()
    downloads = sum(model.download_gb for model in models) + sum(DONE_BY[name].packages_gb for name in names)
    downloads -= DONE_BY["setup"].packages_gb if job.given else 0.0
    downloads -= DONE_BY["peers"].packages_gb if "peers" in names and not job.size.downloads else 0.0
    head = f"mlx-realign measures this machine ({job.kind}): {minutes:.0f} minutes, {downloads:.1f} GB to download"
    tail = f"All is kept in {output}; the result is {output}/result.json. Ctrl-C ends it, the same command goes on."
    advice = "Plug the machine in, close other programs, and leave it alone." if mac_facts.MAC else ""
    return "\n".join(filter(None, [head, *lines, tail, advice]))


def do(job: Job, names: list[str]) -> None:
    """Part after part; one that fails is told, and the next one goes on."""
    parts = job.result["parts"]
    left = [name for name in names if parts.get(name, {}).get("status") != "done"]
    for name in PARTS:
        if parts.get(name, {"status": "left out"})["status"] == "left out":
            reason = "not reached" if name in names else "not asked for"
            parts[name] = {"status": "left out", "reason": reason, "seconds": 0.0, "entries": []}
    for name in names:
        known = parts[name]
        if name not in left and not (name == "setup" and left):  # its environment may be gone
            say(f"{name}: done in an earlier run")
            continue
        say(f"{name}: {DONE_BY[name].about}")
        started, job.part = time.perf_counter(), name
        part: dict[str, Any] = {**known, "status": "interrupted", "reason": "ended from outside"}
        parts[name] = part
        job.save()
        try:
            DONE_BY[name].run(job)
            bad = sum(entry["status"] == "failed" for entry in part["entries"])
            reason = f"{bad} of {len(part['entries'])} measurements failed" if bad else None
            part |= {"status": "failed" if bad else "done", "reason": reason}
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts are worth their time
            message = clean(str(error), job.work).splitlines()
            part |= {"status": "failed", "reason": f"{type(error).__name__}: {message[-1] if message else ''}"}
        finally:
            part["seconds"] = round(known["seconds"] + time.perf_counter() - started, 1)
            job.save()
        say(f"{name}: {part['status']}{', ' + part['reason'] if part['reason'] else ''}, {part['seconds']:.0f} s")
        if name == "setup" and part["status"] != "done" and not job.given:
            break


def now() -> str:
    """In UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def awake() -> None:
    """A Mac does not go to sleep while this process is there."""
    if mac_facts.MAC and (program := shutil.which("caffeinate")):
        subprocess.Popen([program, "-i", "-w", str(os.getpid())])


def finish(job: Job, keep: bool) -> int:
    """The table, the files, the work folder away; the exit code."""
    parts = job.result["parts"]
    job.result["ended"] = now()
    job.save()
    text = mac_page.page(job.result)
    job.path.with_suffix(".md").write_text(text, encoding="utf-8")
    say("\n" + text)
    say(f"Please attach {job.path} to an issue, with the table above ({job.path.with_suffix('.md')}).")
    ended = job.result["ended_by"]
    if ended:
        say(f"It was ended by {ended}; the same command goes on from there. What it needs for that is in {job.work}.")
    elif not keep:
        mac_facts.undo(job)
        job.clear()
    return 1 if any(part["status"] in ("failed", "interrupted") for part in parts.values()) else 0


def main(argv: list[str] | None = None) -> int:
    """0: all was measured; 1: something failed; 2: wrong flags; 130, 143 or 129: ended by a signal."""
    a = arguments(argv)
    try:
        job = job_of(a)
    except Missing as error:
        say(f"error: {error}")
        return 2
    os.chdir(ROOT)
    names = chosen(a)
    say(told(job, names, a.output))
    if not a.yes:
        if not sys.stdin.isatty():
            say("error: nobody to ask; --yes goes on without")
            return 2
        with suppress(EOFError, KeyboardInterrupt):
            if input("Go on? [y/N] ").strip().lower() in ("y", "yes"):
                return measured(job, names, a.keep)
        return 0
    return measured(job, names, a.keep)


def measured(job: Job, names: list[str], keep: bool) -> int:
    """All of it, until a signal ends it; the exit code."""
    asked: list[int] = []

    def end(number: int, _: Any) -> None:
        asked.append(number)
        os.write(2, b"\nending what runs; the result is kept\n")
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    awake()
    try:
        do(job, names)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the result is being written
        job.result["ended_by"] = signal.Signals(asked[-1]).name
    code = finish(job, keep)
    return 128 + asked[-1] if asked else code


if __name__ == "__main__":
    raise SystemExit(main())
