# SPDX-License-Identifier: Apache-2.0
r"""Runs an untrusted Python program where it can read, write, reach and start nothing, and not for long.

    with program(code) as ask:
        ask("stdin", "2 3\n", 1.0)      # the program as a script with this input: Outcome("ok", b"5\n", b"")
        ask("call", "f(2, 3)", 1.0)     # the value of an expression after it: Outcome("ok", b"", b"5")

One interpreter is started per program and forks for each question, with process numbers and a /tmp of its own where
there are namespaces, so that no test meets what another has left behind (sandbox_child.py). What isolates depends on
the machine, the first of these that holds when it is tried:

    Linux     namespaces (no network, no file but Python's own library, an empty /tmp in memory, no other process) and
              a filter of system calls; where namespaces are forbidden, as in many containers, the filter without files,
              which are neither opened nor looked at
    macOS     a sandbox profile: no network, process or program, writes only in an empty folder

Each holds limits besides: processor time, memory, size of files, open files, threads (counted by process, since the
kernel's own limit counts a user), wall clock, output. Where nothing holds,
`program` raises NoIsolation unless the environment has MLX_REALIGN_UNSAFE_CODE=1, which means limits only.
"""

import contextlib
import functools
import marshal
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import sandbox_child, sandbox_play

UNSAFE = "MLX_REALIGN_UNSAFE_CODE"
START_S = 5.0  # for a sandbox to be there
GRACE_S = 0.5  # beyond a test's own limit before the whole sandbox is ended
START = """import sys
package = type(sys)("box")
package.__path__ = [sys.argv[1]]
sys.modules["box"] = package
import box.sandbox_child
box.sandbox_child.main()"""

# What must fail inside; run once before anything else is, because a kernel may take a limit and not keep it.
PROBE = """
import os, signal, socket, sys
LINUX = sys.platform == "linux"
def breaches(path, port, process):
    found = []
    def attempt(what, action):
        try:
            action()
        except OSError:
            return
        found.append(what)
    attempt("read a file", lambda: open(path).close())
    attempt("wrote a file", lambda: open(path, "a").close())
    attempt("made a file", lambda: open(path + ".new", "w").close())
    attempt("used the network", lambda: socket.socket().connect(("127.0.0.1", port)))
    attempt("signalled a process", lambda: os.kill(process, signal.SIGCONT))
    if LINUX:
        attempt("saw a file", lambda: os.stat(path))
        attempt("touched a device", lambda: os.utime("/dev/null"))
    return found
"""


class NoIsolation(Exception):
    """Nothing on this machine confines a program; the message says what was tried."""


class Limits(NamedTuple):
    """For one program; the output's is for each test."""

    total_s: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20


class Outcome(NamedTuple):
    """Of one question. `status` is "ok" or what went wrong: one of sandbox_play.STATUSES."""

    status: str
    output: bytes = b""
    result: bytes = b""


class Route(NamedTuple):
    """How programs are confined here: its name for sandbox_child, "" for not at all; what of; what was tried before."""

    name: str
    made_of: str
    why: str


Ask = Callable[[str, str, float], Outcome]


def isolation() -> str | None:
    """What confines programs on this machine, for a reader; None where nothing does."""
    found = route()
    return found.made_of if found.name not in ("", "unsafe") else None


def refusal() -> str | None:
    """Why no program may be run here, or None."""
    found = route()
    if found.name:
        return None
    return (
        f"no isolation: this machine offers nothing that confines untrusted programs ({found.why}). Run on Linux with "
        f"user namespaces or seccomp, or on macOS; or allow programs to run unconfined (--unsafe-code)"
    )


@functools.cache
def route() -> Route:
    """The first way of confining that holds here. Tried once per process."""
    tried = []
    for name in candidates():
        try:
            return Route(name, _probe(name), "; ".join(tried))
        except (OSError, ValueError) as error:
            tried.append(f"{name}: {error}")
    unsafe = os.environ.get(UNSAFE) == "1"
    return Route("unsafe" if unsafe else "", "nothing", "; ".join(tried) or f"no way known on {sys.platform}")


def candidates() -> tuple[str, ...]:
    """Ways of confining to try, best first; see sandbox_child.enter."""
    if sys.platform == "darwin":
        return ("seatbelt",)
    if sys.platform != "linux":
        return ()
    return ("root", "user", "calls") if os.geteuid() == 0 else ("user", "calls")


@contextlib.contextmanager
def program(code: str, limits: Limits = Limits()) -> Iterator[Ask]:  # noqa: B008 - a constant
    """Start a sandbox for one program: ask(mode, text, seconds) -> Outcome, see sandbox_child for the modes.

    `ask` raises nothing: when the sandbox is gone or its time is up, all further outcomes are "died" or "timeout".
    Raises NoIsolation, and OSError where the sandbox does not start.
    """
    problem = refusal()
    if problem:
        raise NoIsolation(problem)
    with _child(route().name, code, limits) as (_, ask):
        yield ask


@contextlib.contextmanager
def _child(name: str, code: str, limits: Limits) -> Iterator[tuple[str, Ask]]:
    """A sandbox by that route: (what it is made of, ask)."""
    # Linux needs no folder, and a worker that is killed leaves none: the new root is mounted where /proc was.
    folder = "/proc" if name in ("root", "user", "calls") else tempfile.mkdtemp(prefix="realign-code-")
    try:
        process = _started()
        try:
            _say(process, {"route": name, "folder": folder, "code": code, **limits._asdict()})
            hello = _heard(process, time.monotonic() + START_S, 10_000).decode(errors="replace")
            if hello.startswith("!"):
                raise OSError(hello[1:])
            # A busy machine starts a sandbox late; that is not the program's time.
            yield hello, functools.partial(_ask, process, time.monotonic() + limits.total_s, limits, [])
        finally:
            _end(process)
    finally:
        if folder != "/proc":
            sandbox_child.remove(folder)


def _started() -> subprocess.Popen[bytes]:
    python = getattr(sys, "_base_executable", None) or sys.executable
    flags = ["-S", "-s", "-P", "-W", "ignore", "-X", "utf8", "-c", START, os.path.dirname(os.path.abspath(__file__))]
    return subprocess.Popen(
        [python, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd="/",
        env={"PYTHONHASHSEED": "0"},  # the order of sets, the same in every run
        start_new_session=True,
    )


def _ask(
    process: subprocess.Popen[bytes], end: float, limits: Limits, over: list[str], mode: str, text: str, seconds: float
) -> Outcome:
    now = time.monotonic()
    if over or now >= end:
        return Outcome(over[0] if over else "timeout")
    seconds = min(seconds, end - now)
    try:
        _say(process, (mode, text, seconds))
        reply = _heard(process, now + seconds + GRACE_S, limits.output_bytes + sandbox_child.RESULT_BYTES + 100)
        status, output, result = struct.unpack_from(">BII", reply)
        if 9 + output + result != len(reply):
            raise ValueError("a reply of another length")
        return Outcome(sandbox_play.STATUSES[status], reply[9 : 9 + output], reply[9 + output :])
    except TimeoutError:
        over.append("timeout")
    except (OSError, ValueError, IndexError, struct.error):
        over.append("died")
    return Outcome(over[0])


def _say(process: subprocess.Popen[bytes], message: Any) -> None:
    data = marshal.dumps(message)
    data = struct.pack(">I", len(data)) + data
    assert process.stdin is not None
    while data:
        data = data[os.write(process.stdin.fileno(), data) :]


def _heard(process: subprocess.Popen[bytes], deadline: float, most: int) -> bytes:
    """One message of the sandbox, of at most that many bytes. Raises TimeoutError, OSError at its end, ValueError."""
    (length,) = struct.unpack(">I", _read(process, 4, deadline))
    if length > most:
        raise ValueError(f"a message of {length} bytes")
    return _read(process, length, deadline)


def _read(process: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
    assert process.stdout is not None
    parts = bytearray()
    while len(parts) < count:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise TimeoutError("the sandbox does not answer")
        part = os.read(process.stdout.fileno(), count - len(parts))
        if not part:
            raise OSError("the sandbox has ended")
        parts += part
    return bytes(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The end of its input ends a sandbox with all that is in it; what does not follow is killed."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.close()
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # an interrupt leaves nothing behind either
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def _probe(name: str) -> str:
    """Whether this route holds: what it is made of. Raises OSError saying what failed or what a program could do."""
    folder = tempfile.mkdtemp(prefix="realign-probe-")
    path = os.path.join(folder, "canary")
    listener = socket.socket()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, b"canary")
            if sys.platform == "linux" and os.geteuid() == 0 and name != "user":
                # Theirs whom root becomes inside, so that nothing but the isolation is in the way; nobody else's.
                os.fchown(file, sandbox_child.NOBODY, sandbox_child.NOBODY)
                os.chown(folder, sandbox_child.NOBODY, sandbox_child.NOBODY, follow_symlinks=False)
        finally:
            os.close(file)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with _child(name, PROBE, Limits(total_s=10.0)) as (made_of, ask):
            found = ask("call", f"breaches({path!r}, {listener.getsockname()[1]}, {os.getpid()})", 8.0)
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
    if found.status != "ok" or found.result != b'["l"]':
        raise OSError(f"{made_of}: {found.status} {found.result.decode(errors='replace')[:200]}")
    return made_of
