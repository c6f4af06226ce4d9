# SPDX-License-Identifier: Apache-2.0
"""What Linux offers to confine a process, through ctypes: namespaces, dropped privileges, a system-call filter.

`namespaces` gives the calling process a network without interfaces and a file system of its own: the standard library
and shared libraries read-only, nothing else; `alone` then gives each test process ids and a small /tmp in memory, and
`drop_privileges` takes from it what made that possible. `filter_calls` allows the system calls that a computing Python
needs and no other: no new process, no program started, no socket, no signal to another process; with `files=False` no
file opened or looked at either, which confines where namespaces are forbidden (containers).
A failing step raises OSError and the caller must not go on: half an isolation is none.
"""

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

from .sandbox_child import NOBODY

READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/gnu/store")
DEVICES = ("null", "zero", "urandom")
PACKAGES = ("site-packages", "dist-packages")  # in a folder python* of a library
STAGE = "/stage"

# unshare(2)
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NEW_ANY = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x2000000 | 0x80  # and NEWCGROUP, NEWTIME
# mount(2), mount_setattr(2), umount2(2)
RDONLY, NOSUID, NODEV, REMOUNT, BIND, MOVE, REC, PRIVATE = 1, 2, 4, 32, 4096, 8192, 16384, 1 << 18
AT_RECURSIVE, DETACH = 0x8000, 2
# statvfs flag -> mount flag, for a remount that may not lose any of them
KEPT = {2: NOSUID, 4: NODEV, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
# prctl(2)
PDEATHSIG, DUMPABLE, SET_SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38

# capget(2), capset(2)
CAPABILITIES = struct.pack("Ii", 0x20080522, 0)  # of version 3, this process
NEEDED = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 21  # KILL, SETGID, SETUID, SYS_ADMIN: to make a test a place and end it

# machine -> (column of the tables below, audit architecture of seccomp(2))
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
# name, number on x86_64, on aarch64 (-1: none), from the kernel's unistd.h; all of them act on this process alone
COMPUTING = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, close 3 57, fstat 5 80,
lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
brk 12 214, mremap 25 216, madvise 28 233, msync 26 227, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133, rt_sigtimedwait 128 137, sigaltstack 131 132,
futex 202 98, sched_yield 24 124, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -1, getpid 39 172, gettid 186 178, getppid 110 173,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, exit 60 93, exit_group 231 94,
getrandom 318 278, set_robust_list 273 99, rseq 334 293, set_tid_address 218 96, sched_getaffinity 204 123,
getrlimit 97 163, getcwd 79 17, dup 32 23, dup2 33 -1, dup3 292 24, pipe 22 -1, pipe2 293 59,
select 23 -1, pselect6 270 72, poll 7 -1, ppoll 271 73, epoll_create1 291 20, epoll_create 213 -1, epoll_ctl 233 21,
epoll_wait 232 -1, epoll_pwait 281 22, eventfd2 290 19, times 100 153, getrusage 98 165, sysinfo 99 179,
uname 63 160, alarm 37 -1, getitimer 36 102, setitimer 38 103, restart_syscall 219 128, membarrier 324 283,
getcpu 309 168, recvfrom 45 207, shutdown 48 210, pause 34 -1, umask 95 166"""
FILES = """
newfstatat 262 79, stat 4 -1, lstat 6 -1, statx 332 291, open 2 -1, openat 257 56, access 21 -1, faccessat 269 48,
faccessat2 439 439, readlink 89 -1, readlinkat 267 78,
getdents64 217 61, chdir 80 49, fchdir 81 50, mkdir 83 -1, mkdirat 258 34, rmdir 84 -1, unlink 87 -1, unlinkat 263 35,
rename 82 -1, renameat 264 38, renameat2 316 276, truncate 76 45, ftruncate 77 46, fchmod 91 52, chmod 90 -1,
fchmodat 268 53, utimensat 280 88, statfs 137 43, fstatfs 138 44, fsync 74 82, fdatasync 75 83,
fadvise64 221 223, sendfile 40 71, copy_file_range 326 285"""
# Calls that are allowed with certain arguments only: numbers on (x86_64, aarch64), then (offset of half an argument in
# struct seccomp_data, the values it may have), all of which must hold. OWN is the number of the calling process.
OWN = object()
GUARDED: list[tuple[tuple[int, int], list[tuple[int, list[Any]]]]] = [
    ((62, 129), [(16, [OWN])]),  # kill
    ((234, 131), [(16, [OWN])]),  # tgkill
    ((302, 261), [(16, [0, OWN])]),  # prlimit64
    ((157, 167), [(16, [15])]),  # prctl: the name of a thread
    ((16, 29), [(24, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])]),  # ioctl: is it a terminal, non-blocking ...
    ((72, 25), [(24, [0, 1, 2, 3, 4, 1030, 1031, 1032])]),  # fcntl, but for signals to an owner
    ((53, 199), [(16, [1]), (24, [1, 0x801, 0x80001, 0x80801])]),  # socketpair of joined streams, as asyncio wants
    ((44, 206), [(48, [0]), (52, [0])]),  # sendto without an address
]
# Locks of files: said to be taken and not, since a test has no other process to share a file with, and what it can open
# beside its own is the machine's. (flock, then fcntl with the commands F_SETLK, F_SETLKW.)
FLOCK, FCNTL, LOCKING = (73, 32), (72, 25), (6, 7)
CLONE, CLONE3, THREAD = (56, 220), 435, 0x10000
ALLOW, DENY, UNKNOWN = 0x7FFF0000, 0x00050001, 0x00050026  # errno EPERM; ENOSYS, on which the C library falls back
DONE = 0x00050000  # errno 0: the call answers that it did what it did not
LOAD, EQUAL, TEST, ANSWER = 0x20, 0x15, 0x45, 0x06
PIVOT_ROOT = (155, 41)
MOUNT_SETATTR = 442  # on every machine

_SOMEBODY = b"\xfeown"  # stands for OWN in a filter made ahead; no system-call number or argument
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library; integers go as unsigned longs. Raises OSError with its name when it answers -1."""
    ctypes.set_errno(0)
    result = getattr(_libc, name)(*(ctypes.c_ulong(x) if isinstance(x, int) else x for x in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def die_with_parent() -> None:
    """SIGKILL when the parent ends. Again after every fork and change of user: both clear it."""
    call("prctl", PDEATHSIG, 9, 0, 0, 0)


def machine() -> tuple[int, int] | None:
    """(column of the system-call tables, audit architecture), None where this file knows no numbers."""
    found = MACHINES.get(os.uname().machine)
    return found if found and sys.maxsize > 2**32 and sys.byteorder == "little" else None


def can_filter() -> bool:
    """Whether the kernel takes system-call filters: with no program it answers EFAULT where it does, EINVAL else."""
    if machine() is None:
        return False
    try:
        call("prctl", SET_SECCOMP, 2, 0, 0, 0)
    except OSError as error:
        return error.errno == 14
    return False


def drop_privileges() -> None:
    """No capability left and none to be had; root becomes nobody. Raises OSError where nobody has no number here."""
    if os.getuid() == 0 or os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", CAPABILITIES, bytes(24))
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", DUMPABLE, 0, 0, 0, 0)  # its memory and descriptors are closed to others of the same user
    die_with_parent()  # which the change of user has undone


def namespaces(folder: str, as_user: bool) -> None:
    """Network, files, IPC of its own. What is left of the privileges is what `alone` needs.

    `folder` is any folder that is needed no more, used as a mount point that only this process sees. `as_user` makes a
    user namespace first, in which an ordinary user may do this; without it the caller must be root.
    """
    own = NEWNS | NEWUTS | NEWIPC | NEWNET
    if as_user:
        user, group = os.geteuid(), os.getegid()
        call("unshare", own | NEWUSER)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {group} 1")
    else:
        call("unshare", own)
    _new_root(folder)
    held = ctypes.create_string_buffer(24)
    call("capget", CAPABILITIES, held)
    needed = struct.unpack("6I", held.raw)[1] & NEEDED
    call("capset", CAPABILITIES, struct.pack("6I", needed, needed, 0, 0, 0, 0))
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", DUMPABLE, 0, 0, 0, 0)
    die_with_parent()


def alone() -> None:
    """After `namespaces`, for one test: an empty /tmp; the next child is process 1, with which all in it end."""
    call("unshare", NEWNS | NEWPID | NEWIPC)
    _mount("tmpfs", STAGE, "tmpfs", NOSUID | NODEV, "size=32m,nr_inodes=8192,mode=1777")
    for name in os.listdir("/tmp"):  # a library that lies there
        os.mkdir(f"{STAGE}/{name}", 0o755)
        _mount(f"/tmp/{name}", f"{STAGE}/{name}", None, BIND | REC)
    _mount(STAGE, "/tmp", None, MOVE)
    os.chdir("/tmp")


def thread_counter() -> Callable[[int], int] | None:
    """A function that counts the threads of a process, also when /proc cannot be reached any more; None without it."""
    try:
        processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.close(os.open(f"{os.getpid()}/stat", os.O_RDONLY, dir_fd=processes))
    except OSError:
        return None

    def count(process: int) -> int:
        try:
            file = os.open(f"{process}/stat", os.O_RDONLY, dir_fd=processes)
        except OSError:  # it has ended
            return 0
        try:
            return int(os.read(file, 4096).rpartition(b")")[2].split()[17])
        except (OSError, ValueError, IndexError):
            return 0
        finally:
            os.close(file)

    return count


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    call("mount", source.encode(), target.encode(), kind.encode() if kind else None, flags, options.encode() or None)


def _new_root(folder: str) -> None:
    """Make a root in memory at `folder`, put the read-only folders and a mount point /tmp into it, and move in."""
    _mount("none", "/", None, REC | PRIVATE)
    _mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, "size=1m,nr_inodes=1024,mode=755")
    for path in ("/tmp", STAGE):
        os.mkdir(folder + path)
    library = os.path.dirname(os.path.dirname(os.path.abspath(os.__file__)))
    done: list[str] = []
    for path in (*READABLE, library, f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib"):
        if path == "/" or not os.path.isdir(path) or any(f"{path}/".startswith(f"{there}/") for there in done):
            continue
        os.makedirs(folder + path, exist_ok=True)
        _mount(path, folder + path, None, BIND | REC)
        _hide_packages(folder + path)
        _read_only(folder + path)
        done.append(path)
    os.makedirs(f"{folder}/dev", exist_ok=True)
    for name in DEVICES:  # read-only too: it is the device that is written then, not its owner, mode or times
        device = f"{folder}/dev/{name}"
        os.close(os.open(device, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(f"/dev/{name}", device, None, BIND)
        _read_only(device, NOSUID)
    _mount("none", folder, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    os.chdir(folder)
    found = machine()
    if found:
        call("syscall", PIVOT_ROOT[found[0] - 1], b".", b".")
        call("umount2", b".", DETACH)
    else:
        os.chroot(".")
    os.chdir("/")


def _hide_packages(folder: str) -> None:
    """Nothing where packages are installed: other people's modules are no part of Python."""
    for name in os.listdir(folder):
        for kind in PACKAGES:
            path = f"{folder}/{name}/{kind}"
            if name.startswith("python") and os.path.isdir(path):
                _mount("tmpfs", path, "tmpfs", RDONLY | NOSUID | NODEV, "size=4k,mode=555")


def _read_only(path: str, also: int = NOSUID | NODEV) -> None:
    """Everything mounted at or below `path`; before Linux 5.12 the mount at `path` alone can be turned in one go."""
    wanted = struct.pack("QQQQ", RDONLY | also, 0, 0, 0)
    try:
        call("syscall", MOUNT_SETATTR, -100, path.encode() + b"\0", AT_RECURSIVE, wanted, len(wanted))
    except OSError as error:
        if error.errno != 38:
            raise
        present = os.statvfs(path).f_flag
        kept = sum(flag for bit, flag in KEPT.items() if present & bit)
        _mount("none", path, None, BIND | REMOUNT | RDONLY | also | kept)


def filter_calls(files: bool) -> None:
    """From here on this process (one thread) and what it becomes may make the listed system calls and no other.

    Everything else answers EPERM. `files` allows opening, making and removing files too: only within a file system
    that `namespaces` made. Raises OSError where the kernel takes no filter.
    """
    code = filter_code(files).replace(_SOMEBODY, struct.pack("I", os.getpid()))
    steps = ctypes.create_string_buffer(code, len(code))
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", SET_SECCOMP, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(steps)), 0, 0)


@functools.cache
def filter_code(files: bool) -> bytes:
    """The filter for a process yet unknown: made once, before forking, it costs a fork nothing."""
    found = machine()
    if found is None:
        raise OSError(38, "no system-call numbers for this machine")
    (somebody,) = struct.unpack("I", _SOMEBODY)
    return b"".join(struct.pack("HBBI", *step) for step in _program(*found, files=files, own=somebody))


def _program(column: int, audit: int, *, files: bool, own: int) -> list[tuple[int, int, int, int]]:
    """The filter as classic BPF steps (code, jump if true, jump if false, value)."""
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (ANSWER, 0, 0, DENY), (LOAD, 0, 0, 0)]
    steps += [(EQUAL, 0, 1, FLOCK[column - 1]), (ANSWER, 0, 0, DONE if files else DENY)]
    if files:
        locking = [step for command in LOCKING for step in ((EQUAL, 0, 1, command), (ANSWER, 0, 0, DONE))]
        steps += [(EQUAL, 0, 6, FCNTL[column - 1]), (LOAD, 0, 0, 24), *locking, (LOAD, 0, 0, 0)]
    for entry in (COMPUTING + ("," + FILES if files else "")).split(","):
        number = int(entry.split()[column])
        if number >= 0:
            steps += [(EQUAL, 0, 1, number), (ANSWER, 0, 0, ALLOW)]
    for numbers, conditions in GUARDED:
        inner: list[tuple[int, int, int, int]] = []
        for offset, values in conditions:
            values = [own if value is OWN else value for value in values]
            inner.append((LOAD, 0, 0, offset))
            inner += [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
            inner.append((ANSWER, 0, 0, DENY))
        inner.append((ANSWER, 0, 0, ALLOW))
        steps += [(EQUAL, 0, len(inner), numbers[column - 1]), *inner]
    steps += [
        (EQUAL, 0, 5, CLONE[column - 1]),
        (LOAD, 0, 0, 16),
        (TEST, 2, 0, NEW_ANY),
        (TEST, 0, 1, THREAD),
        (ANSWER, 0, 0, ALLOW),
        (ANSWER, 0, 0, DENY),
        (EQUAL, 0, 1, CLONE3),
        (ANSWER, 0, 0, UNKNOWN),
        (ANSWER, 0, 0, DENY),
    ]
    return steps
