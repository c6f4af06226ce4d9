# SPDX-License-Identifier: Apache-2.0
"""Loads a fast BLAS before MLX on Linux, where MLX's CPU wheel brings the reference one (2 GFLOP/s against 100).

Must run before `mlx.core` is imported: the first `cblas_sgemm` in the process's global scope wins.
Sources, in order: the PyPI package `cmeel-openblas` (extra `cpu`), then the system's `libopenblas.so.0`.
"""

import ctypes
import os
import platform
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MISSING = (
    "no fast BLAS found: float32 matmuls on this CPU run about 50 times slower. "
    "Get one with: pip install 'mlx-realign[cpu]'"
)


def load_fast_blas() -> str | None:
    """Put OpenBLAS in the process's global scope; returns its path, or None where there is none (or no need).

    Only Linux needs it; a process that was started with OpenBLAS preloaded keeps that one.
    """
    if platform.system() != "Linux" or "mlx.core" in sys.modules or _mapped():
        return _mapped()
    packages = Path(sysconfig.get_path("purelib"))
    for candidate in (packages / "cmeel.prefix/lib/libopenblas.so.0", Path("libopenblas.so.0")):
        if len(candidate.parts) > 1 and not candidate.exists():
            continue
        if _open(str(candidate)) or (_provide_gfortran(packages) and _open(str(candidate))):
            return str(candidate)
    return None


def missing() -> str | None:
    """One line on what is missing where matmuls run on the slow BLAS; None where they do not."""
    return MISSING if platform.system() == "Linux" and _in_use() is None else None


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


def set_threads(count: int) -> None:
    """Number of threads of each matmul; no effect where OpenBLAS is not the one in use."""
    path = _in_use()
    if path:
        ctypes.CDLL(path).openblas_set_num_threads(ctypes.c_int(count))


@cache
def _in_use() -> str | None:
    """As `_mapped`, once loading is over: the maps are some thousand lines, and a library that is there stays."""
    return _mapped()


def _mapped() -> str | None:
    if platform.system() != "Linux":
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libopenblas"):  # not numpy's own copy, whose names carry a prefix
            return path
    return None


def _open(path: str) -> bool:
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _provide_gfortran(packages: Path) -> bool:
    """cmeel-openblas needs `libgfortran.so.5`, which a bare machine lacks but the MLX and NumPy wheels carry renamed.

    A copy with the standard name written back over the longer one serves; it lives in the temporary folder.
    """
    for wheel in ("mlx_cpu.libs", "numpy.libs"):
        for source in sorted((packages / wheel).glob("libgfortran-*.so.5*")):
            for quadmath in sorted((packages / wheel).glob("libquadmath-*.so*")):
                _open(str(quadmath))
            standard = b"libgfortran.so.5"
            renamed = source.name.encode()
            content = source.read_bytes().replace(renamed, standard + b"\0" * (len(renamed) - len(standard)))
            with tempfile.TemporaryDirectory() as folder:  # once mapped, the file itself is not needed
                target = os.path.join(folder, "libgfortran.so.5")
                Path(target).write_bytes(content)
                if _open(target):
                    return True
    return False
