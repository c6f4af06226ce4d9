# SPDX-License-Identifier: Apache-2.0
"""Give a peer the fast BLAS that mlx-realign loads for itself, from outside and without changing a file of the peer.

    python benchmarks/blas_folder.py VENV FOLDER     # prints the two variables to set

MLX's Linux CPU wheel brings a BLAS of 2 GFLOP/s; a peer timed with it would lose for the wrong reason. FOLDER gets
`libopenblas.so.0` (from VENV's own cmeel-openblas) and the Fortran run-time it needs, copied from VENV's MLX wheel
with the standard names written over the longer ones that the wheel gave them.
"""

import argparse
import shutil
import sys
from pathlib import Path


def make(venv: Path, folder: Path) -> dict[str, str]:
    """Fill `folder` from the packages of `venv`; returns the environment that preloads it (empty where not Linux)."""
    if sys.platform != "linux":
        return {}
    packages = next((venv / "lib").glob("python3*/site-packages"))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(packages / "cmeel.prefix/lib/libopenblas.so.0", folder)
    quadmath = next((packages / "mlx_cpu.libs").glob("libquadmath-*.so.0*"))
    gfortran = next((packages / "mlx_cpu.libs").glob("libgfortran-*.so.5*"))
    names = {quadmath.name: "libquadmath.so.0", gfortran.name: "libgfortran.so.5"}
    for source in (quadmath, gfortran):
        content = source.read_bytes()
        for long, standard in names.items():  # same length in bytes, so no offset in the file moves
            content = content.replace(long.encode(), standard.encode().ljust(len(long), b"\0"))
        (folder / names[source.name]).write_bytes(content)
    return {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": str(folder / "libopenblas.so.0")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for name, value in make(arguments.venv, arguments.folder.absolute()).items():
        print(f"export {name}={value}")
