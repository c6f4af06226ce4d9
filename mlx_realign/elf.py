# SPDX-License-Identifier: Apache-2.0
"""Lets MLX's library call the BLAS and LAPACK of another one, in this process and nowhere else.

A shared library on Linux calls what it imports through pointers (ELF jump slots). `bind` finds those of MLX in memory
and writes other addresses into them; it works before and after MLX's first product. Standard library only: drivers of
other trainers in `benchmarks/` take this file by itself.
"""

import ctypes
import os
import platform
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PREFIXES = ("", "scipy_")  # of the functions' names
DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_RELASZ, DT_JMPREL = 2, 5, 6, 7, 8, 23  # elf.h
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine
SLOT_KINDS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}  # R_*_GLOB_DAT and R_*_JUMP_SLOT


class _LinkMap(ctypes.Structure):  # link.h
    _fields_ = [("l_addr", ctypes.c_size_t), ("l_name", ctypes.c_char_p), ("l_ld", ctypes.c_size_t)]


class _SymbolInfo(ctypes.Structure):  # dlfcn.h: Dl_info
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("at", ctypes.c_size_t),
    ]


def bind(path: str) -> tuple[ctypes.CDLL, str]:
    """Let MLX call this library for each function of BLAS and LAPACK that it has; (the library, its names' prefix).

    Raises OSError where it cannot be loaded or has no products. Whether it can be trusted is `blas.prove`'s affair.
    """
    library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    prefix = next((p for p in PREFIXES if hasattr(library, f"{p}cblas_sgemm")), None)
    if prefix is None:
        raise OSError("has no function cblas_sgemm")
    _write(library, prefix)
    return library, prefix


def _write(library: ctypes.CDLL, prefix: str) -> None:
    """Into every slot whose function the library has."""
    page = os.sysconf("SC_PAGE_SIZE")
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for name, slot in slots().items():
        if not hasattr(library, prefix + name):
            continue
        if mprotect(ctypes.c_void_p(slot // page * page), ctypes.c_size_t(page), 3):  # PROT_READ | PROT_WRITE
            raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: MLX's table of functions")
        ctypes.c_void_p.from_address(slot).value = ctypes.cast(library[prefix + name], ctypes.c_void_p).value


def bind_own() -> None:
    """Let MLX call the BLAS and LAPACK that its wheel brings, whatever was preloaded; nothing where it brings none."""
    for file in sorted(Path(mlx_library()).parents[2].glob("mlx*.libs/lib*.so*")):
        if file.name.startswith(("libblas", "liblapack")):
            _write(ctypes.CDLL(str(file)), "")


def slots() -> dict[str, int]:
    """Addresses of the pointers by which MLX calls BLAS and LAPACK, by the function's name."""
    path = mlx_library()
    if platform.system() != "Linux" or platform.machine() not in SLOT_KINDS or not path:
        return {}
    import mlx.core  # noqa: F401  # loads it

    loaded, pointer = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW), ctypes.POINTER(_LinkMap)()
    if ctypes.CDLL(None).dlinfo(ctypes.c_void_p(loaded._handle), 2, ctypes.byref(pointer)):  # RTLD_DI_LINKMAP
        return {}
    base, at = pointer.contents.l_addr, pointer.contents.l_ld
    entries: dict[int, int] = {}
    while (tag := ctypes.c_int64.from_address(at).value) != 0:
        entries[tag] = ctypes.c_size_t.from_address(at + 8).value
        at += 16
    address = lambda tag: entries[tag] + (base if entries[tag] < base else 0)  # noqa: E731  # glibc has added it, or not
    kinds, found = SLOT_KINDS[platform.machine()], {}
    for table, size in ((DT_JMPREL, DT_PLTRELSZ), (DT_RELA, DT_RELASZ)):
        if found or table not in entries:
            continue
        for offset, info, _ in struct.iter_unpack("<QQq", ctypes.string_at(address(table), entries[size])):
            if info & 0xFFFFFFFF in kinds:
                symbol = ctypes.c_uint32.from_address(address(DT_SYMTAB) + 24 * (info >> 32)).value
                name = ctypes.string_at(address(DT_STRTAB) + symbol).decode()
                if name.startswith("cblas_") or _is_lapack(name):
                    found[name] = base + offset
    return found


def _is_lapack(name: str) -> bool:
    """Fortran names: a type, four to six letters, an underscore."""
    return name[:1] in tuple("sdcz") and name.endswith("_") and 5 <= len(name) - 1 <= 7 and name[:-1].isalpha()


def mlx_library() -> str:
    """The file of MLX's library; empty where there is none."""
    spec = find_spec("mlx.core")
    path = Path(spec.origin).parent / "lib/libmlx.so" if spec and spec.origin else None
    return str(path) if path and path.is_file() else ""


def preloaded() -> str | None:
    """The file whose `cblas_sgemm` everything in this process finds first: one that was preloaded."""
    try:
        return file_of(ctypes.CDLL(None).cblas_sgemm)
    except AttributeError:
        return None


def file_of(function: Any) -> str:
    """The file that a function of a library is in."""
    info = _SymbolInfo()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return os.path.realpath(os.fsdecode(info.file or b""))
