# SPDX-License-Identifier: Apache-2.0
"""What confines the programs of the verifier `code`: each way that this machine has, what it forbids, how it ends."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import verifier_tools

from mlx_realign.verifiers import code, sandbox
from mlx_realign.verifiers.answers import Refused

ADD = "def add(a, b):\n    return a + b\n"
LINUX = sys.platform == "linux"
each_way = verifier_tools.each_way


def score(program: str, *tests: object, **row: object) -> float | str | None:
    """The score, or the reason of a refusal."""
    try:
        return code.verify(f"```python\n{program}\n```", {"tests": list(tests), **row})
    except Refused as refused:
        return refused.reason


ECHO = """
import sys
from collections import Counter
n = int(input())
print(n, *sorted(Counter(sys.stdin.read()).items()))
"""


def test_right_programs_pass_every_kind_of_test(each_way: str):
    two = {"input": "2\nab", "output": "2 ('a', 1) ('b', 1)\n"}
    assert score(ECHO, two, {"input": "3\n\n", "output": "3 ('\\n', 1)"}) == 1
    assert score(ADD, {"call": "add(2, 3)", "expected": 5}, {"call": "add([1], [2])", "expected": [1, 2]}) == 1
    assert score(ADD, "assert add(2, 3) == 5", "assert add('a', 'b') == 'ab'", "assert add(1, -1) in (0, 1)") == 1
    trusted = "r = add(1, 2)\nassert isinstance(r, int) and r == 3"
    assert score(ADD, trusted, trusted_asserts=True) == 1
    assert score(ADD.replace("+", "-"), trusted, trusted_asserts=True) == "raised"


def test_what_confines_is_tried_before_it_is_trusted(each_way: str):
    assert sandbox.isolation()
    forbidden = {
        "fork": "import os\nprint(1 if os.fork() else 2)",
        "start a program": "import subprocess\nprint(subprocess.run(['/bin/true']).returncode)",
        "read this file": f"print(len(open({__file__!r}).read()))",
        "list a folder": f"import os\nprint(len(os.listdir({str(Path(__file__).parent)!r})))",
        "write": "open('/tmp/../var/tmp/x', 'w').write('x')\nprint(1)",
        "use a socket": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))\nprint(1)",
        "signal its parent": "import os\nos.kill(os.getppid(), 9)\nprint(1)",
        "signal everybody": "import os\nos.kill(-1, 9)\nprint(1)",
    }
    for what, program in forbidden.items():
        with sandbox.program(program) as ask:
            outcome = ask("stdin", "", 2.0)
            assert outcome.status != "ok" and outcome.output == b"", what
            assert ask("stdin", "", 2.0).status == outcome.status, f"{what}: the sandbox did not outlive it"


OPEN = """
import os
print(dict(os.environ))
for n in range(3, 64):
    try:
        os.get_inheritable(n)
        print(n)
    except OSError:
        pass
"""


def test_the_environment_is_empty_and_nothing_is_open(each_way: str):
    with sandbox.program(OPEN) as ask:  # but for where its result goes and what tells that it lives
        assert ask("stdin", "", 2.0).output.split(b"\n") == [b"{}", b"3", b"4", b""]


@pytest.mark.skipif(not LINUX, reason="the filter of system calls is Linux's")
def test_the_filter_lets_pass_what_it_lists_and_nothing_else():
    from mlx_realign.verifiers import sandbox_linux as linux

    assert linux.can_filter() or linux.machine() is None

    def answer(number: int, audit: int, *arguments: int, files: bool = False) -> int:
        """What the filter says to a call: a little interpreter of its five steps."""
        data = {0: number, 4: audit}
        for i, value in enumerate(arguments):
            data |= {16 + 8 * i: value & 0xFFFFFFFF, 20 + 8 * i: value >> 32}
        steps, held, at = linux._program(1, 0xC000003E, files=files, own=77), 0, 0
        while True:
            step, true, false, value = steps[at]
            if step == linux.ANSWER:
                return value
            if step == linux.LOAD:
                held, true = data.get(value, 0), 0
            else:
                true = true if (held == value if step == linux.EQUAL else held & value) else false
            at += 1 + true

    intel = 0xC000003E
    allowed = {"read": [0], "kill itself": [62, intel, 77], "make a thread": [56, intel, 0x3D0F00]}
    allowed |= {"copy a descriptor": [72, intel, 1, 1030], "socket pair": [53, intel, 1, 0x80801]}
    allowed |= {"send": [44, intel, 5, 1, 1, 0, 0, 0], "its own limits": [302, intel, 0]}
    for what, (number, *rest) in allowed.items():
        assert answer(number, *(rest or [intel])) == linux.ALLOW, what
    denied = {"open": [2], "fork": [57], "execve": [59], "socket": [41], "ptrace": [101], "io_uring": [425]}
    denied |= {"another machine": [0, 0x40000003], "x32": [0x40000000], "kill another": [62, intel, 1]}
    denied |= {"kill all": [62, intel, 2**32 - 1], "a process": [56, intel, 17], "bpf": [321]}
    denied |= {"a namespace": [56, intel, 0x10010000], "owner of signals": [72, intel, 1, 8]}
    denied |= {"type into a terminal": [16, intel, 0, 0x5412], "datagrams": [53, intel, 1, 2]}
    denied |= {"an address": [44, intel, 5, 1, 1, 0, 2**32], "limits of another": [302, intel, 78]}
    denied |= {"no more death with the parent": [157, intel, 1]}
    for what, (number, *rest) in denied.items():
        assert answer(number, *(rest or [intel])) == linux.DENY, what
    assert answer(435, intel) == linux.UNKNOWN
    assert answer(2, intel, files=True) == linux.ALLOW
    for number in (4, 6, 262, 332):  # stat, lstat, newfstatat, statx
        assert (answer(number, intel), answer(number, intel, files=True)) == (linux.DENY, linux.ALLOW)
    locks = {(73,): 0, (72, 6): 0, (72, 7): 0, (72, 5): linux.DENY, (72, 1030): linux.ALLOW, (72, 8): linux.DENY}
    for (number, *command), expected in locks.items():  # said to be taken, where there are files
        found = answer(number, intel, 3, *command, files=True)
        assert found == (linux.DONE if expected == 0 else expected), (number, command)
        assert answer(number, intel, 3, *command) == (expected or linux.DENY)
    assert answer(165, intel, files=True) == linux.DENY  # mount


def test_the_profile_for_macos_denies_before_it_allows(tmp_path: Path):
    from mlx_realign.verifiers import sandbox_macos

    folder = tmp_path / 'a "quoted" folder'
    text = sandbox_macos.profile(str(folder))
    assert text.replace('\\"', "").count('"') % 2 == 0 and text.count("(") == text.count(")")
    rules = [line.split("(", 1)[1].split()[:2] for line in text.splitlines() if line.startswith("(")]
    assert rules[:2] == [["version", "1)"], ["allow", "default)"]]
    denied = {"network*)", "process-fork)", "process-exec*)", "mach-lookup)", "signal)", "file-write*)"}
    assert denied < {what for verb, what in rules if verb == "deny"}
    for kind in ("file-write*", "file-read-data"):  # the last rule that fits is the one that counts
        order = [verb for verb, what in rules if what.rstrip(")") == kind]
        assert order == ["deny", "allow"], kind
    assert str(folder).replace('"', '\\"') in text


def test_without_isolation_nothing_runs_unless_allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "candidates", lambda: ())
    monkeypatch.setattr(sandbox, "route", sandbox.route.__wrapped__)
    monkeypatch.delenv(sandbox.UNSAFE, raising=False)
    assert sandbox.isolation() is None
    assert score(ADD, "assert add(1, 2) == 3") == "no_isolation"
    assert "no isolation" in (code.check({"tests": ["assert add(1, 2) == 3"]}) or "")
    monkeypatch.setenv(sandbox.UNSAFE, "1")
    assert sandbox.isolation() is None
    assert code.check({"tests": ["assert add(1, 2) == 3"]}) is None
    assert score(ADD, "assert add(1, 2) == 3") == 1
    assert score("while True: pass", "assert add(1, 2) == 3", time_limit_s=0.2) == "timeout"
    assert score("import os, time\nif os.fork() == 0:\n    time.sleep(60)\n" + ADD, "assert add(1, 2) == 3") == 1


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_sandbox_dies_with_whoever_started_it(each_way: str):
    script = (
        "import sys\nfrom mlx_realign.verifiers import sandbox\n"
        f"sandbox.candidates = lambda: ({each_way!r},)\n"
        "with sandbox.program('while True: pass') as ask:\n    print('on', flush=True)\n    ask('stdin', '', 4.0)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert worker.stdout is not None and worker.stdout.readline() == b"on\n"
        deadline, least = time.monotonic() + 2, 3
        while len(inside := descendants(worker.pid)) < least and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(inside) == least
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        if worker.stdout:
            worker.stdout.close()
    deadline = time.monotonic() + 3
    while any(map(runs, inside)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(runs, inside))


def descendants(process: int) -> list[int]:
    """Numbers of the processes that it started, and theirs."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(word) for text in lists for word in text.split()]
    return [x for child in children for x in (child, *descendants(child))]


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_sandbox_is_started_with_nothing_but_the_standard_library():
    folder = Path(sandbox.__file__).parent
    for name in ("sandbox_child", "sandbox_play", "sandbox_linux", "sandbox_macos"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.module or node.names[0].name).startswith("sandbox_")
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
