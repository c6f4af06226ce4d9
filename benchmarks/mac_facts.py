# SPDX-License-Identifier: Apache-2.0
"""Parts `setup` and `tests` of `mac.py`: an environment, what the machine is, and the suite on its GPU."""

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import launch
from mac_job import ROOT, Job, Missing, clean, say

NOT_TO_TEST = ("ruff", "pyright", "build")  # of the extra `dev`
SHOWN_LINES = 3  # of a failure
TESTS_LIMIT_S = 3600.0
# That tests failed (1) or none was found (5) is a result.
RESULT = "import sys, subprocess; sys.exit(subprocess.call(sys.argv[1:]) not in (0, 1, 5))"
MAC = sys.platform == "darwin"

DEVICE = """
import importlib.metadata as metadata, json, mlx_realign, mlx.core as mx
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
names = ("mlx", "mlx-metal", "mlx-lm", "transformers", "numpy")
told = {key: value for key, value in mx.device_info().items() if isinstance(value, (int, float, str))}
print(json.dumps({"device": str(mx.default_device()), "metal": mx.metal.is_available(), "mlx_realign":
    mlx_realign.__version__, "device_info": told, "versions": {name: version(name) for name in names}}))
"""

# fact -> command -> what of its output; none of them tells who the machine's owner is
SYSCTL = {"chip": "machdep.cpu.brand_string", "cores": "hw.ncpu", "memory_bytes": "hw.memsize",
          "performance_cores": "hw.perflevel0.physicalcpu", "efficiency_cores": "hw.perflevel1.physicalcpu",
          "wired_limit_mb": "iogpu.wired_limit_mb"}  # fmt: skip


def setup(job: Job) -> None:
    """An environment in the work folder, unless one was given, then facts."""
    if not job.given:
        _environment(job, job.work / "venv")
    for name, command, pattern in _asked():
        of = {"fact": name}
        if (known := job.entry(of)) and known["status"] == "done":
            continue
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            match = re.search(pattern, text)
            if not match:
                raise ValueError("not told")
            value = match.group(1).strip()
            found = {name: int(value) if value.isdigit() else value}
            job.note(of, "done", None, command=" ".join(command), found=found)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            job.note(of, "left out", f"not told by this machine ({type(error).__name__})", command=" ".join(command))
    job.measure({"fact": "device"}, [job.python, "-c", DEVICE], lambda text, _: json.loads(text.splitlines()[-1]))


def _asked() -> list[tuple[str, list[str], str]]:
    """(fact, command, pattern) on this system."""
    if not MAC:
        return [("chip", ["cat", "/proc/cpuinfo"], r"model name\s*: (.*)"), ("cores", ["nproc"], r"(\d+)"),
                ("memory_kib", ["cat", "/proc/meminfo"], r"MemTotal:\s*(\d+)")]  # fmt: skip
    return [
        *((name, ["sysctl", "-n", key], r"(.+)") for name, key in SYSCTL.items()),
        ("macos", ["sw_vers", "-productVersion"], r"(.+)"),
        ("gpu_cores", ["system_profiler", "SPDisplaysDataType"], r"Total Number of Cores: (\d+)"),
        ("power_source", ["pmset", "-g", "batt"], r"'(.+?)'"),
        ("low_power_mode", ["pmset", "-g"], r"lowpowermode\s+(\d)"),
        ("thermal_warning", ["pmset", "-g", "therm"], r"(.+)"),
    ]


def commit() -> dict[str, Any]:
    """Of this checkout, and whether it was changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        return {"commit": found, "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


def _environment(job: Job, venv: Path) -> None:
    """A virtual environment with what the suite needs, and this checkout in it."""
    if (job.entry({"environment": "made"}) or {}).get("status") == "done" and job.python.exists():
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [line for line in project["optional-dependencies"]["dev"] if not line.startswith(NOT_TO_TEST)]
    extra = "" if MAC else "[cpu]"
    say(f"  an environment in {venv}: downloads about 0.6 GB of packages unless pip has them")
    before = set(ROOT.glob("*.egg-info"))
    found = {"python": platform.python_version()}
    try:
        launch.run([sys.executable, "-m", "venv", "--clear", venv])
    except launch.Failed as error:
        raise Missing(clean(str(error), job.work).splitlines()[-1]) from error
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    (job.work / "made-egg-info").write_text("" if before else "yes")  # only what was made here is taken away again
    words = [*pip, *wanted, "--editable", f"{ROOT}{extra}"]
    if job.measure({"environment": "made"}, words, lambda *_: found, again=True) is None:
        raise Missing("the packages could not be installed; no other part can run")


def undo(job: Job) -> None:
    """What installing left in the checkout."""
    mark = job.work / "made-egg-info"
    if mark.exists() and mark.read_text():
        for folder in ROOT.glob("*.egg-info"):
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink()
            folder.rmdir()


def memory_gb() -> float | None:
    """Of this machine, as it is sold: GB of 2**30 bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return None


def tests(job: Job) -> None:
    """The quick tests, then those that need a GPU, float32 products exact."""
    kinds = {"quick": list(job.size.tests), "gpu": ["-m", "gpu", *job.size.tests]}
    for kind, words in kinds.items():
        report = job.scratch / f"{kind}.xml"
        command = [job.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short"]
        several = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"] if not job.size.tests else ["-n", "0"]
        command += ["-o", "tmp_path_retention_policy=none"]
        words = [job.python, "-c", RESULT, *command, *several, *words]
        exact = {"MLX_ENABLE_TF32": "0", "HF_HUB_OFFLINE": "1"}
        found = job.measure({"tests": kind}, words, lambda *_, report=report: counts(report, job.work),
                            environment=exact, limit=TESTS_LIMIT_S)  # fmt: skip
        if found and found["failed"] + found["errors"]:
            say(f"  {found['failed'] + found['errors']} of {found['tests']} tests failed")


def counts(report: Path, work: Path) -> dict[str, Any]:
    """Numbers of a JUnit report, and the names and last lines of what failed."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    found: dict[str, Any] = {"tests": 0, "failed": 0, "errors": 0, "skipped": 0, "failures": {}}
    for suite in suites:
        for key, name in (("tests", "tests"), ("failed", "failures"), ("errors", "errors"), ("skipped", "skipped")):
            found[key] += int(suite.get(name, 0))
        for case in suite.iter("testcase"):
            for bad in (*case.findall("failure"), *case.findall("error")):
                lines = [line for line in (bad.text or bad.get("message") or "").splitlines() if line.strip()]
                name = f"{case.get('classname')}::{case.get('name')}"
                found["failures"][name] = [clean(line, work) for line in lines[-SHOWN_LINES:]]
    found["passed"] = found["tests"] - found["failed"] - found["errors"] - found["skipped"]
    return found
