# SPDX-License-Identifier: Apache-2.0
"""Attacks of a judged program on the machine, on the next test and on its neighbours; and of other users on a judge."""

import fcntl
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import verifier_tools

from mlx_realign.verifiers import Refused, code, sandbox, sandbox_child

each_way = verifier_tools.each_way
linux = pytest.mark.skipif(sys.platform != "linux", reason="devices, locks and counts are looked at as Linux has them")


def said(program: str, *inputs: str, seconds: float = 2.0) -> list[sandbox.Outcome]:
    """What the program writes, for each input."""
    with sandbox.program(program) as ask:
        return [ask("stdin", text, seconds) for text in inputs or ("",)]


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory that anyone may write to, as /tmp, and a user who hides nothing."""
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.umask(0)
    yield tmp_path
    os.umask(before)
    tmp_path.chmod(0o700)


# Other users of the machine. ----------------------------------------------------------------------------------------


def test_a_link_planted_for_the_probe_is_not_followed(each_way: str, shared: Path, monkeypatch: pytest.MonkeyPatch):
    """Another user who wins the race to the folder puts a link where the canary comes."""
    target, trap = shared / "someone's file", shared / "trap"
    target.write_text("theirs")
    target.chmod(0o600)
    trap.mkdir()
    (trap / "canary").symlink_to(target)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(trap))
    with pytest.raises(FileExistsError):
        sandbox._probe(each_way)
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("theirs", 0o600)


def test_no_other_user_can_reach_or_foresee_what_a_judge_puts_into_the_temporary_directory(
    each_way: str, shared: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, int]] = []
    real = subprocess.Popen

    def look(*arguments: Any, **settings: Any) -> Any:
        seen.extend((path.name, path.lstat().st_mode & 0o777) for path in shared.rglob("*"))
        return real(*arguments, **settings)

    monkeypatch.setattr(subprocess, "Popen", look)
    for _ in range(2):
        sandbox._probe(each_way)
    # A folder and the canary, each time, with another folder on macOS: nobody else may do anything with them.
    folders = 1 if sys.platform == "linux" else 2
    assert [mode & 0o077 for _, mode in seen] == [0] * 2 * (folders + 1)
    assert len({name for name, _ in seen if name != "canary"}) == 2 * folders
    seen.clear()
    said("print(1)")
    assert len(seen) == folders - 1  # on Linux nothing that a worker could leave when it is killed
    assert not list(shared.iterdir())


# The machine. -------------------------------------------------------------------------------------------------------

# Each would change nothing: the mode and times are those that the device has. What counts is whether it may.
DEVICES = """
import os
done = []
for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev", "/tmp/..", os.__file__, os.path.dirname(os.__file__), 0):
    for name, call in (
        ("mode", lambda: os.chmod(path, MODE)),
        ("now", lambda: os.utime(path)),
        ("then", lambda: os.utime(path, (1, 1)) if path == 0 else os.utime(path, ns=TIMES)),
        ("owner", lambda: os.chown(path, os.getuid(), -1)),
        ("attribute", lambda: os.setxattr(path, "user.x", b"x")),
    ):
        try:
            call()
            done.append((path, name))
        except OSError:
            pass
print([x for x in done if x[0] != 0], flush=True)
with open("/dev/null", "w") as null, open("/dev/zero", "rb") as zero:
    null.write("x")
    print(zero.read(2))
"""


@linux
def test_devices_and_the_library_cannot_be_changed_by_mode_or_time_and_can_be_used(each_way: str):
    found = os.stat("/dev/null")
    text = DEVICES.replace("MODE", str(found.st_mode & 0o7777)).replace(
        "TIMES", str((found.st_atime_ns, found.st_mtime_ns))
    )
    (outcome,) = said(text)
    if each_way == "calls":
        assert outcome.output == b"[]\n"  # and cannot be opened either
    else:
        assert outcome == ("ok", b"[]\nb'\\x00\\x00'\n", b"")
    after = os.stat("/dev/null")
    assert (after.st_mode, after.st_mtime_ns) == (found.st_mode, found.st_mtime_ns)


LOOK = """
import os
seen = []
for path in PATHS:
    for look in (os.stat, os.lstat, os.listdir, open, lambda path: os.access(path, os.F_OK) or 1 / 0):
        try:
            look(path)
            seen.append(path)
        except (OSError, ZeroDivisionError):
            pass
print(seen)
"""


@linux
def test_whether_a_file_of_the_machine_is_there_cannot_be_seen(each_way: str):
    paths = [__file__, str(Path(__file__).parent), "/etc", "/etc/passwd", "/proc/self", "/var", "/sys"]
    assert said(LOOK.replace("PATHS", repr(paths)))[0].output == b"[]\n"


@linux
def test_modules_that_other_people_have_installed_cannot_be_imported(each_way: str):
    library = Path(os.__file__).parent
    kinds = [library / "site-packages", library / "dist-packages", *Path("/usr/lib").glob("python3*/*-packages")]
    folders = [str(path) for path in kinds if path.is_dir() and any(path.iterdir())]
    if not folders:
        pytest.skip("no modules are installed beside this Python")
    stems = {path.stem for folder in folders for path in Path(folder).iterdir()}
    names = sorted(name for name in stems - sys.stdlib_module_names if name.isidentifier() and name[0] != "_")[:20]
    program = f"""
import sys
sys.path += {folders}
found = []
for name in {names}:
    try:
        __import__(name)
        found.append(name)
    except Exception as error:
        found += [] if isinstance(error, ImportError) else [name]
print(found)
"""
    assert said(program)[0].output == b"[]\n"


@linux
def test_locks_of_the_machines_files_are_neither_felt_nor_taken(each_way: str):
    if each_way == "calls":
        pytest.skip("no file can be opened there")
    program = """
import fcntl, os
own, library = open("own", "w"), open(os.__file__)
for file in (own, library):
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
fcntl.lockf(own, fcntl.LOCK_EX)
print("taken")
"""
    with open(os.__file__) as library:
        fcntl.flock(library, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert said(program) == [("ok", b"taken\n", b"")]


# The next test. -----------------------------------------------------------------------------------------------------

# Leaves a mark wherever it can and says what it finds: the same, if each test is the first.
MARKS = """
import builtins, os, sys, tempfile
found = [sorted(map(str, builtins.__dict__.get("marks", ()))), sorted(os.environ.items()), hex(id(object()))]
builtins.marks = ["mark"]
os.environ["MARK"] = input()
if WHOLE:
    found += [os.getpid(), os.getppid(), os.getcwd()]
for folder in (".", "..", "/tmp", "/var/tmp", "/dev/shm", "/", os.path.dirname(os.__file__), tempfile.tempdir or "/"):
    try:
        found.append((folder, sorted(os.listdir(folder)), os.stat(folder).st_ino if folder != "." else 0))
    except OSError as error:
        found.append((folder, error.errno))
    for mark in ("mark", f"mark{len(os.environ['MARK'])}"):
        try:
            os.mkdir(os.path.join(folder, mark))
            os.chmod(os.path.join(folder, mark), 0)
        except OSError as error:
            found.append((folder, error.errno))
try:
    file = open("count", "a")
    found.append((file.tell(), os.fstat(file.fileno()).st_ino))
    file.write("x")
except OSError as error:
    found.append(error.errno)
print(found)
"""


def test_a_test_finds_nothing_that_another_one_left(each_way: str):
    whole = each_way in ("root", "user")  # there each test has process numbers of its own
    first, other, again = said(MARKS.replace("WHOLE", str(whole)), "a\n", "long" * 2000 + "\n", "a\n")
    assert first.status == other.status == "ok"
    assert first.output == again.output


# Its neighbours. ----------------------------------------------------------------------------------------------------

MANY = """
import threading, time
threading.stack_size(1 << 16)
threads = [threading.Thread(target=time.sleep, args=(WAIT,)) for _ in range(COUNT)]
for thread in threads:
    thread.start()
print(len(threads), flush=True)
"""


@linux
def test_threads_are_limited_by_program_and_take_none_from_others(each_way: str):
    many, few, bomb = (
        MANY.replace("WAIT", wait).replace("COUNT", count)
        for wait, count in (("0.8", "100"), ("0.1", "60"), ("0.8", "2000"))
    )
    with ThreadPoolExecutor(3) as threads:
        first = [threads.submit(said, many, seconds=4.0) for _ in range(2)]
        time.sleep(0.4)  # both have theirs
        assert said(few) == [("ok", b"60\n", b"")]
        assert [future.result()[0].output for future in first] == [b"100\n"] * 2
    assert said(bomb)[0].status == "died"


HANG = {
    "loop": "while True: pass",
    "in C": "sum(range(10**12))",
    "sleep": "import time\ntime.sleep(60)",
    "catching everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "lock": "import threading\nx = threading.Lock()\nx.acquire(); x.acquire()",
    "threads": "import threading\nfor _ in range(9): threading.Thread(target=sum, args=(iter(int, 1),)).start()",
}


def test_66_hanging_at_once_are_all_timed_out_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if sandbox.isolation() is None:
        pytest.skip(sandbox.route().why)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    row = {"tests": [{"call": "f()", "expected": 1}], "time_limit_s": 0.3}

    def verdict(text: str) -> str:
        try:
            return str(code.verify(f"```python\n{text}\n```", row))
        except Refused as refused:
            return refused.reason

    before = threading.active_count(), held(), verifier_tools.children()
    start = time.monotonic()
    with ThreadPoolExecutor(64) as threads:
        found = Counter(threads.map(verdict, [*HANG.values()] * 11))
    seconds = time.monotonic() - start
    assert found == {"timeout": 66}
    assert seconds < 30
    assert (threading.active_count(), held(), verifier_tools.children()) == before
    assert not list(tmp_path.iterdir())


@linux
def test_a_sandbox_that_does_not_start_in_time_is_a_timeout(each_way: str, monkeypatch: pytest.MonkeyPatch):
    before = held(), verifier_tools.children()
    monkeypatch.setattr(sandbox, "START_S", 0.001)
    with pytest.raises(Refused, match="timeout"):
        code.verify("```python\nprint(1)\n```", {"tests": [{"input": "", "output": "1"}]})
    assert (held(), verifier_tools.children()) == before


def held() -> int:
    """Descriptors of this process, without those of objects that nobody holds any more."""
    gc.collect()
    folder = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")
    return len(list(folder.iterdir()))


def test_a_folder_that_is_hard_to_remove_is_removed(tmp_path: Path):
    place = tmp_path / "place"
    (place / "a" / "b").mkdir(parents=True)
    (place / "a" / "b" / "file").touch()
    (place / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir(mode=0o750)
    (place / "a" / "b").chmod(0)
    (place / "a").chmod(0)
    sandbox_child.remove(str(place))
    assert not place.exists() and (tmp_path / "kept").stat().st_mode & 0o777 == 0o750
