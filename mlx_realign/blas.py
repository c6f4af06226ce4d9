# SPDX-License-Identifier: Apache-2.0
"""Gives MLX a fast BLAS and LAPACK on Linux, where its CPU wheel brings the reference ones (2 GFLOP/s against 100).

No file is copied, and nothing but MLX calls another library than before (`elf.bind`).

A library that was built for another processor ends the process at its first instruction that is not there. So each
candidate first proves itself in a child process (`prove`), once per library, processor and MLX; verdicts are kept on
disk. Candidates, in order: $MLX_REALIGN_BLAS (a path), one that was preloaded, the PyPI package `scipy-openblas32`
(extra `cpu`; it chooses its kernels at run time), the system's OpenBLAS. With none left MLX's own serves, slowly.
"""

import ctypes
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from . import elf
from .cache import cache_dir

CHOICE, MLX = "MLX_REALIGN_BLAS", "mlx"  # a library to try first, or MLX's own
CORETYPE = "OPENBLAS_CORETYPE"
PLAINER = {"x86_64": ("Haswell", "Prescott"), "aarch64": ("ARMV8",)}  # where those for this very processor fail
SYSTEM = ("libopenblas.so.0", "libopenblas.so")
MARK = "verdict: "  # before what the child says
FATAL = {signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}
PROOF_S = 30.0  # a proof takes less than a second; a library that hangs takes this long, once
QUIET_S = 2.0  # a proof that takes longer says so
STALE_S = 86_400.0  # a library that hung may have met a busy machine: it is tried again after a day
ABSENT = "is not there"
HANGS = "did not end"
INSTALL = "Install one: pip install 'mlx-realign[cpu]', or the system's libopenblas"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Candidate(NamedTuple):
    """A library that may serve. path: of the file, or a name that the loader looks up; kernels: those it is to take."""

    name: str
    path: str
    kernels: str = ""


class InUse(NamedTuple):
    """The library that MLX calls. library: None for MLX's own."""

    name: str
    path: str
    library: ctypes.CDLL | None
    prefix: str
    rejected: tuple[str, ...]  # a clause for each candidate that failed its proof

    @property
    def wanting(self) -> bool:
        """Whether it is MLX's own, unasked for, or others failed: worth a line wherever a model is loaded."""
        return bool(self.rejected) or (self.library is None and os.environ.get(CHOICE) != MLX)

    def line(self) -> str | None:
        """One line: which BLAS runs and which do not, with what to do where it is MLX's own; None off Linux's CPUs."""
        if not self.name:
            return None
        said = f"BLAS: {self.name}"
        if self.library is None:
            said += ", about 50 times slower than a fast one"
        if self.rejected:
            said += f" (not used: {'; '.join(self.rejected)})"
        return f"{said}. {INSTALL}" if self.library is None and self.wanting else said


warned = ""  # the line that `warn` has said
_told_by_command = False
_usual = os.cpu_count() or 1  # threads of a matmul, until a policy says otherwise
_in_use = InUse("", "", None, "", ())  # before `load_fast_blas`, and where MLX calls no BLAS


def load_fast_blas() -> InUse:
    """Bind the first candidate that proves itself, or else MLX's own; once per process. Imports `mlx.core`."""
    if not _in_use.name and elf.slots():
        adopt(_first(candidates()))
        if _in_use.library is None and elf.preloaded():  # it would be called otherwise
            elf.bind_own()
    return _in_use


def adopt(found: InUse) -> None:
    """Threads are set, and lines written, for this one."""
    global _in_use
    _in_use = found


def in_use() -> InUse:
    """What `load_fast_blas` found."""
    return _in_use


def warn() -> None:
    """Say the line through `warnings`, once per process; not within `told_by_command`."""
    global warned
    line = _in_use.line()
    if line and not warned and not _told_by_command:
        warned = line
        warnings.warn(line, stacklevel=4)  # whoever makes a policy


def untold(line: str) -> bool:
    """Whether `warn` has not said this line."""
    return line != warned


@contextmanager
def told_by_command() -> Iterator[None]:
    """Inside, the line is left to a command, which says it among what else is to be said of a model."""
    global _told_by_command
    before, _told_by_command = _told_by_command, True
    try:
        yield
    finally:
        _told_by_command = before


def for_a_command() -> bool:
    """Whether this package is being imported by `mlx-realign` or `python -m mlx_realign.NAME`."""
    return bool(sys.argv) and (sys.argv[0] == "-m" or Path(sys.argv[0]).name == "mlx-realign")


def candidates() -> Iterator[Candidate]:
    """Libraries to try, the most wanted first."""
    choice = os.environ.get(CHOICE, "")
    if choice.lower() == MLX:
        return
    if choice:  # a name without a folder is looked up by the loader, unless it is a file here
        here = Path(choice).expanduser()
        yield Candidate(choice, str(here.absolute()) if here.exists() or "/" in choice else choice)
    if preloaded := elf.preloaded():
        yield Candidate(f"the preloaded {Path(preloaded).name}", preloaded)
    package = find_spec("scipy_openblas32")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for kernels in ("", *PLAINER[platform.machine()]):
            yield Candidate("scipy-openblas32", str(Path(folder) / "lib/libscipy_openblas.so"), kernels)
    yield from (Candidate(f"{name} of the system", name) for name in SYSTEM)


def set_threads(most: int | None = None) -> None:
    """At most so many threads for each matmul, and no more than usual; None: as many as usual.

    No effect where the library in use has no such function.
    """
    if setter := _function("openblas_set_num_threads"):
        setter(ctypes.c_int(_usual if most is None else min(most, _usual)))


def set_usual_threads(count: int) -> None:
    """Threads of each matmul from here on, where nothing asks for fewer."""
    global _usual
    _usual = count
    set_threads()


def threads() -> int | None:
    """What `set_threads` set; None where the library in use does not say."""
    getter = _function("openblas_get_num_threads")
    return getter() if getter else None


def keep_freed_memory(*, sparing: bool = False) -> None:
    """Let glibc keep up to 256 MB of freed memory instead of returning it: MLX's CPU arrays come and go by malloc.

    Fetching their pages from the kernel again costs about 5% of a training step. sparing: keep 16 MB, and give large
    arrays back one by one; for steps with gradient checkpointing it costs nothing.
    """
    if platform.system() == "Linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, 4 << 20 if sparing else 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, 16 << 20 if sparing else 256 << 20)


# ---------------------------------------------------------------------------------------------------- the choice


def _first(every: Iterator[Candidate]) -> InUse:
    rejected: list[str] = []
    for candidate in every:
        verdict = prove(candidate)
        if fault := verdict.get("fault"):
            clause = f"{candidate.name} {fault}"
            if clause not in rejected and (fault != ABSENT or candidate.name == os.environ.get(CHOICE)):
                rejected.append(clause)  # once, not for each kind of kernels
            continue
        before = os.environ.get(CORETYPE)
        os.environ |= _coretype(candidate)  # it reads this as it is loaded
        try:
            library, prefix = elf.bind(verdict["path"])
        except OSError as error:
            rejected.append(f"{candidate.name} {error}")
            continue
        finally:
            if candidate.kernels:
                os.environ.pop(CORETYPE) if before is None else os.environ.update({CORETYPE: before})
        kernels = f", {verdict['kernels']}" if verdict["kernels"] else ""
        return InUse(f"{candidate.name}{kernels}", verdict["path"], library, prefix, tuple(rejected))
    return InUse("MLX's own", "", None, "", tuple(rejected))


def _coretype(candidate: Candidate) -> dict[str, str]:
    return {CORETYPE: candidate.kernels} if candidate.kernels else {}


def prove(candidate: Candidate, *, limit_s: float = PROOF_S) -> dict[str, Any]:
    """The verdict on a candidate, from disk or by a child process that multiplies with it.

    {"path", "prefix", "kernels"} of a good one, {"fault": clause} of another; ABSENT where there is no such library.
    """
    if "/" in candidate.path and (trouble := _no_library(Path(candidate.path))):
        return {"fault": trouble}
    file = _verdict_file(candidate)
    if file and (known := _known(file)):
        return known
    verdict, own = _ask_child(candidate, limit_s)
    if file and own:
        _keep(file, verdict)
    return verdict


def _no_library(path: Path) -> str | None:
    """What is wrong with a file that no process need be risked for."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except FileNotFoundError:
        return ABSENT
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    machine = int.from_bytes(head[18:20], "little")
    if head[:4] != b"\x7fELF":
        return "is no shared library"
    return None if machine == elf.MACHINES[platform.machine()] else "is built for another kind of processor"


def _ask_child(candidate: Candidate, limit_s: float) -> tuple[dict[str, Any], bool]:
    """(the verdict, whether it is about the library and not about this moment, this process or its limits)."""
    if not sys.executable or getattr(sys, "frozen", False):
        return {"fault": "cannot be tried out: this program has no Python interpreter of its own to do it in"}, False
    command = [sys.executable, "-P", "-m", f"{__package__}.blas_proof", candidate.path]
    # Nothing else of this process's path: a script's own folder may hold names of the standard library.
    needed = [str(Path(__file__).parents[1]), str(Path(elf.mlx_library()).parents[2])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(needed),
        CHOICE: MLX,  # or the child would ask a child of its own
    }
    environment |= _coretype(candidate)
    try:
        code, *output = _ended(command, environment, candidate.name, limit_s)
    except subprocess.TimeoutExpired:
        return {"fault": f"{HANGS} within {limit_s:g} s"}, True
    except OSError as error:
        return {"fault": f"could not be tried out: {error.strerror}"}, False
    if code < 0:
        return {"fault": f"ended its process with signal {-code}"}, -code in FATAL
    said, errors = (out.decode(errors="replace").splitlines() for out in output)
    try:
        verdict = json.loads(next(line for line in said if line.startswith(MARK))[len(MARK) :])
        return verdict, verdict.get("fault") != ABSENT
    except (StopIteration, ValueError):
        return {"fault": f"could not be tried out: {(errors or [f'code {code}'])[-1][:200]}"}, False


def _ended(command: Sequence[str], environment: dict[str, str], name: str, limit_s: float) -> tuple[int, bytes, bytes]:
    """(code, output, errors) of a process; whatever breaks off the wait for it, Ctrl-C too, ends it as well."""
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **options) as child:
        try:
            if limit_s > QUIET_S:
                try:
                    return _answer(child, QUIET_S)
                except subprocess.TimeoutExpired:
                    if sys.stderr:
                        waits = f"proving {name} in a process of its own, once per machine: up to {limit_s:g} s ..."
                        print(f"BLAS: {waits}", file=sys.stderr, flush=True)
                limit_s -= QUIET_S
            return _answer(child, limit_s)
        except BaseException:
            child.kill()
            raise


def _answer(child: Any, limit_s: float) -> tuple[int, bytes, bytes]:
    output, errors = child.communicate(timeout=limit_s)
    return child.returncode, output, errors


def _verdict_file(candidate: Candidate) -> Path | None:
    """Where the verdict lies: its name holds all that it depends on. None where results cannot be kept."""
    with_stat = [*([candidate.path] if "/" in candidate.path else ["/etc/ld.so.cache"]), elf.mlx_library(), __file__]
    variables = sorted((k, v) for k, v in os.environ.items() if k.startswith(("OPENBLAS_", "LD_")))
    facts = [candidate.path, candidate.kernels, [stat_of(path) for path in with_stat], processor(), variables]
    try:
        folder = cache_dir() / "blas"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    return folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"


def stat_of(path: str) -> list[Any]:
    """[real path, bytes, time of change in ns]: another file under the same name has others."""
    try:
        found = os.stat(path)
    except OSError:
        return [path]
    return [os.path.realpath(path), found.st_size, found.st_mtime_ns]


def processor() -> list[str]:
    """What /proc/cpuinfo says of the first processor's kind and abilities."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "features")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = file.read(1 << 14).split("\n\n")[0].splitlines()
    except OSError:
        first = []
    kept = [line for line in first if line.split(":")[0].strip().lower() in wanted or line.startswith("CPU ")]
    return [platform.machine(), *kept]


def _known(file: Path) -> dict[str, Any] | None:
    """A verdict that was kept and still holds."""
    try:
        verdict = json.loads(file.read_text(encoding="utf-8"))
        if fault := verdict.get("fault"):
            stale = HANGS in fault and abs(time.time() - file.stat().st_mtime) > STALE_S
            return None if stale else {"fault": str(fault)}
        whole = verdict["stat"] == stat_of(verdict["path"]) and {"prefix", "kernels"} <= set(verdict)
        return verdict if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(file: Path, verdict: dict[str, Any]) -> None:
    """Two processes may write the same verdict at once: each a file of its own, then a rename."""
    try:
        handle, draft = tempfile.mkstemp(dir=file.parent, suffix=".draft")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(verdict, out)
        os.replace(draft, file)
    except OSError:
        pass  # a full or read-only disk: the next process proves it again


def _function(name: str) -> Any:
    return getattr(_in_use.library, _in_use.prefix + name, None) if _in_use.library else None
