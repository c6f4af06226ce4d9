# SPDX-License-Identifier: Apache-2.0
"""The inside of the sandbox: a small trusted process that confines itself and forks once per test.

`sandbox.py` starts it as an interpreter of its own with two pipes as input and output. It reads the program, loads the
standard modules the program names, isolates itself, says how, and then forks for each request, which it does not even
read: the fork does, makes a place that is the test's alone, runs the whole program in a fork of its own with limits,
and answers. Nothing of a test is thus left for the next one, in memory neither. It knows what goes into a test and
never what should come out: a program that took this process over could do no more than answer, and the answer is
compared elsewhere.

    request   marshal: (mode, text, seconds); mode "stdin" runs the program as a script with `text` as its input,
              "call" evaluates the expression `text` after it, "assert" runs the statement `text` after it
    reply     ">BII": index into sandbox_play.STATUSES, bytes of output, bytes of result; then both. The result is
              a value as JSON, see sandbox_play.encode
"""

import contextlib
import fcntl
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .sandbox_play import DIED, MEMORY, OK, OUTPUT, RAISED, RESULT, SYNTAX, TIMEOUT, UNCONFINED, encode, play, write

# Loaded before isolation when a line of the program that imports names them, once for all tests. Where files cannot be
# opened at all (route "calls") these are the modules a program can import.
MODULES = """__future__ abc array ast asyncio atexit base64 binascii bisect builtins calendar cmath codecs collections
collections.abc colorsys concurrent.futures.thread contextlib copy csv ctypes dataclasses datetime decimal difflib
enum errno fractions functools gc graphlib hashlib heapq html inspect io itertools json keyword linecache locale math
numbers operator os pickle platform pprint queue random re secrets select selectors shlex signal socket statistics
string struct subprocess sys tempfile textwrap threading time timeit traceback types typing unicodedata unittest
urllib.parse uuid warnings weakref zlib""".split()
ALIVE = RESULT + 1  # the last descriptor in a test's process
RESULT_BYTES = 1 << 18
THREADS = 128  # of one test, where they can be counted
NOBODY = 65534
DARWIN = sys.platform == "darwin"
_exit = os._exit


def nothing_more(*_: Any) -> None:
    """What a way of confining does where it has nothing to do."""


class Way(NamedTuple):
    """How tests are confined, and by what calls."""

    made_of: str
    prepare: Callable[[], None] = nothing_more
    """Before a test's process is made: what it has for itself."""
    confine: Callable[[str], None] = nothing_more
    """In the test's process, before anything of the program."""
    follow: Callable[[], None] = nothing_more
    """In a fork: end with the process that made it."""
    threads: Callable[[int], int] | None = None
    """How many a process has."""
    at_home: bool = False
    """A test needs a folder of its own within that of the sandbox."""


def main() -> NoReturn:
    """Serve requests until the input ends. The first message is the setup, the first answer what isolates."""
    setup: dict[str, Any] = receive()
    load_modules(setup["code"])
    warm_up()
    try:
        way = enter(setup["route"], setup["folder"])
    except Exception as error:  # whatever went wrong, nothing may run
        send(f"!{error}".encode())
        _exit(1)
    send(way.made_of.encode())
    own = os.getpid()
    while True:
        select.select([0], [], [])
        asked = os.fork()
        if asked == 0:
            try:
                serve(setup, way, parent=own)
            finally:
                _exit(1)
        if os.waitpid(asked, 0)[1] != 0:
            _exit(1)  # the input has ended, or an answer is missing


def serve(setup: dict[str, Any], way: Way, parent: int) -> NoReturn:
    """Answer one request, in a fork of the process that waits for them."""
    way.follow()
    if os.getppid() != parent:  # it ended before this one could ask to end with it
        _exit(1)
    mode, text, seconds = receive()
    home = os.path.join(setup["folder"], os.urandom(8).hex()) if way.at_home else ""
    try:
        if home:
            os.mkdir(home, 0o700)
        way.prepare()
    except OSError:
        send(struct.pack(">BII", UNCONFINED, 0, 0))
        _exit(0)
    reply = run(setup, way, home, mode, text, seconds)
    if home:
        remove(home)
    send(reply)
    _exit(0)


def receive() -> Any:
    """One message of the other side, which is trusted."""
    (length,) = struct.unpack(">I", read_exactly(4))
    return marshal.loads(read_exactly(length))


def read_exactly(count: int) -> bytes:
    """Bytes of the input; the end of the input ends this process."""
    parts = b""
    while len(parts) < count:
        part = os.read(0, count - len(parts))
        if not part:
            _exit(1)
        parts += part
    return parts


def send(message: bytes) -> None:
    """One message to the other side; where that is gone this process ends."""
    try:
        write(1, struct.pack(">I", len(message)) + message)
    except OSError:
        _exit(1)


def load_modules(code: str) -> None:
    """Import what the program may want, while this process can read the library and before anything untrusted runs."""
    lines = " ".join(line for line in code.splitlines() if "import" in line)
    words = set("".join(char if char.isalnum() or char == "_" else " " for char in lines).split())
    wanted = [name for name in MODULES if name.split(".")[0] in words]
    for name in [*wanted, "_strptime"] if "strptime" in code else wanted:
        with contextlib.suppress(ImportError):
            __import__(name)


def warm_up() -> None:
    """Once here what every fork does first: it then finds it done, and copies fewer pages (a third of its time)."""
    exec(compile("def f():\n    pass", "warm up", "exec"), {})
    encode([1, "a", 2.0, {}], [9])
    for file, mode in ((0, "r"), (1, "w")):
        open(file, mode, encoding="utf-8", closefd=False)  # and not closed


def enter(route: str, folder: str) -> Way:
    """Isolate this process.

    Routes: "root" and "user" make namespaces, as the one or the other; "calls" is the system-call filter without
    files; "seatbelt" is macOS; "unsafe" is nothing.
    """
    os.environ.clear()
    os.chdir("/")
    if route in ("root", "user", "calls"):
        return enter_linux(route, folder)
    import shutil  # for `remove`, once for all tests

    assert shutil
    if route == "seatbelt":
        from . import sandbox_macos

        return Way("sandbox profile", confine=sandbox_macos.confine, at_home=True)
    return Way("nothing", at_home=True)


def enter_linux(route: str, folder: str) -> Way:
    """`enter` by namespaces and the system-call filter, or by the filter alone."""
    from . import sandbox_linux as linux

    filtered, files = linux.can_filter(), route != "calls"
    linux.die_with_parent()
    threads, made_of = linux.thread_counter(), "namespaces and system-call filter" if filtered else "namespaces"
    if filtered:
        linux.filter_code(files=files)
    if files:
        linux.namespaces(folder, as_user=route == "user")
    else:
        if not filtered:
            raise OSError(38, "the kernel takes no system-call filter")
        linux.drop_privileges()
        made_of = "system-call filter"
    if threads is None:
        made_of += "; threads are not counted, since there is no /proc"

    def confine(home: str) -> None:
        if files:
            linux.drop_privileges()
        linux.die_with_parent()
        if filtered:
            linux.filter_calls(files=files)
        else:  # processes then
            resource.setrlimit(resource.RLIMIT_NPROC, (THREADS, THREADS))

    return Way(made_of, linux.alone if files else nothing_more, confine, linux.die_with_parent, threads)


def run(setup: dict[str, Any], way: Way, home: str, mode: str, text: str, seconds: float) -> bytes:
    """One test in a fork: its reply. Input, output and result are files without a name."""
    given, output, result = (nameless(setup["folder"]) for _ in range(3))
    if mode == "stdin":
        write(given, text.encode("utf-8", "surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
    alive, held = os.pipe()
    parent = os.getpid()
    process = os.fork()
    if process == 0:
        try:
            become_test(setup, (given, output, nothing(), result, held), home, seconds)
            way.confine(home)
            # Whoever waits may have ended before this process could ask to end with it; as process 1 it sees no parent.
            if os.getppid() not in (parent, 0) or (os.getpid() == 1 and not read_by_somebody(ALIVE)):
                _exit(UNCONFINED)
            _exit(play(setup["code"], mode, text))
        finally:
            _exit(UNCONFINED)
    os.close(held)
    status = wait(process, alive, time.monotonic() + seconds, setup["memory_bytes"], way)
    most = setup["output_bytes"]
    written, answer = os.pread(output, most + 1, 0), os.pread(result, RESULT_BYTES + 1, 0)
    if len(written) > most or len(answer) > RESULT_BYTES:
        status, written, answer = OUTPUT, b"", b""
    return struct.pack(">BII", status, len(written), len(answer)) + written + answer


def read_by_somebody(pipe: int) -> bool:
    """Whether the other end of a pipe is open."""
    poll = select.poll()
    poll.register(pipe, 0)
    return not poll.poll(0)


def nothing() -> int:
    """For what a program writes to its standard error."""
    return os.open(os.devnull, os.O_WRONLY)


def nameless(folder: str) -> int:
    """A new file that can be reached through its descriptor only."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("test")
    path = os.path.join(folder, ".file")
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    return file


def become_test(setup: dict[str, Any], files: tuple[int, ...], home: str, seconds: float) -> None:
    """In the fork: `files` as descriptors 0 to 4 and no others, the folder `home` if there is one, limits."""
    for target, file in enumerate([fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 16) for file in files]):
        os.dup2(file, target)
    os.closerange(ALIVE + 1, 4096)
    if setup["route"] == "unsafe":
        os.setpgid(0, 0)
    if home:
        os.chdir(home)
    limits = {
        "CPU": int(seconds) + 1,
        "AS": setup["memory_bytes"],
        "FSIZE": setup["output_bytes"] + 1,
        "NOFILE": 64,
        "CORE": 0,
    }
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(which)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        try:
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError):
            if not DARWIN:  # macOS refuses some; there the parent watches the memory
                raise
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error then, and not the end


def wait(process: int, alive: int, deadline: float, memory_bytes: int, way: Way) -> int:
    """Wait for a test's process until the deadline, end what is left of it: its status."""
    watched, step, code, status = [0, alive], 0.02, None, TIMEOUT
    while code is None and (left := deadline - time.monotonic()) > 0:
        ready = select.select(watched, [], [], min(left, step))[0]
        if 0 in ready:  # no request comes during a test: the other side has gone
            kill(process)
            _exit(1)
        done, how = os.waitpid(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(how)
        elif alive in ready:  # closed by its end, a moment before that can be seen, or by itself
            watched, step = [0], 0.001
        elif DARWIN and too_large(process, memory_bytes):
            status = MEMORY
            break
        elif way.threads and way.threads(process) > THREADS:  # counted here: the kernel's limit is one for a whole user
            status = DIED
            break
    kill(process, reaped=code is not None)
    if code is None:
        return status
    if code < 0:
        return TIMEOUT if -code in (signal.SIGXCPU, signal.SIGKILL) else DIED
    return code if code in (OK, RAISED, MEMORY, SYNTAX, UNCONFINED) else RAISED


def too_large(process: int, memory_bytes: int) -> bool:
    """macOS: whether the process holds more memory than it may."""
    from . import sandbox_macos

    return sandbox_macos.resident_bytes(process) > memory_bytes


def kill(process: int, reaped: bool = False) -> None:
    """End a test's process and its process group where it has one; in a namespace it is process 1, and all end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    if not reaped:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def remove(folder: str) -> None:
    """The folder with all a program may have put into it, and made hard to remove."""
    import shutil

    with contextlib.suppress(RecursionError):
        for place, folders, _ in os.walk(folder):
            for path in [os.path.join(place, name) for name in folders]:
                if not os.path.islink(path):
                    with contextlib.suppress(OSError):
                        os.chmod(path, 0o700)
        shutil.rmtree(folder, ignore_errors=True)
