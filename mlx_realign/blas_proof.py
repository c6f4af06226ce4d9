# SPDX-License-Identifier: Apache-2.0
"""What a BLAS must compute rightly before MLX may call it; `python -m mlx_realign.blas_proof LIBRARY`, a child process.

Prints the verdict as a line of JSON behind a mark (see `blas.prove`). It may die on the way: that is what it is for.
Sizes reach small and blocked kernels, one and several threads, transposed, batched and thin operands, two callers at
once.
"""

import ctypes
import json
import resource
import sys
import threading
from typing import Any

import mlx.core as mx

from . import blas, elf

# batch, rows, inner, columns
SHAPES = ((1, 1, 1, 1), (1, 5, 3, 7), (2, 1, 300, 40), (1, 129, 257, 65), (7, 33, 40, 17), (1, 320, 600, 512))
LARGE = (1, 1100, 130, 700)


def judge(path: str) -> None:
    """Bind the library, compute with it, print the verdict."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        ctypes.CDLL(path)
    except OSError as error:
        absent = "/" not in path and "cannot open shared object" in str(error)
        _say({"fault": blas.ABSENT if absent else f"cannot be loaded: {error}"})
        return
    try:
        library, prefix = elf.bind(path)
    except OSError as error:
        _say({"fault": str(error)})
        return
    file = elf.file_of(library[f"{prefix}cblas_sgemm"])
    blas.adopt(blas.InUse(path, file, library, prefix, ()))
    fault = _wrong()
    name = getattr(library, f"{prefix}openblas_get_corename", None)
    if name:
        name.restype = ctypes.c_char_p
    kernels = f"{name().decode()} kernels" if name else ""
    good = {"path": file, "stat": blas.stat_of(file), "prefix": prefix, "kernels": kernels}
    _say({"fault": fault} if fault else good)


def _say(verdict: dict[str, Any]) -> None:
    print(blas.MARK + json.dumps(verdict), flush=True)


def _wrong() -> str | None:
    """What the library computes wrongly, or None. Matrices of small integers, whose products float32 holds exactly."""
    mx.set_default_device(mx.cpu)
    for kind in (mx.float32, mx.float64, mx.complex64):
        for shape in SHAPES:
            if not all(_product_is_right(*shape, kind, flips) for flips in range(4)):
                return f"multiplies wrongly ({kind}, {shape})"
    if not all(_product_is_right(*shape, mx.float32, 0, scaled=True) for shape in (*SHAPES, LARGE)):
        return "multiplies wrongly where products are scaled and added (addmm)"
    for count in (1, 2):
        blas.set_usual_threads(count)
        if blas.threads() not in (count, None, 1):  # 1: on a machine with one core
            return f"does not take {count} threads when told to"
        if not _product_is_right(*SHAPES[-1], mx.float32, 0):
            return f"multiplies wrongly in {count} threads"
    right: list[bool] = []

    def work() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            right.extend(_product_is_right(1, 200, 300, 100, mx.float32, 0) for _ in range(8))

    several = [threading.Thread(target=work) for _ in range(2)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    if right != [True] * 16:
        return "multiplies wrongly in several threads at once"
    return _wrong_decomposition()


def _product_is_right(batch: int, m: int, k: int, n: int, kind: Any, flips: int, *, scaled: bool = False) -> bool:
    """Freivalds' check: (A B) r = A (B r) for a random vector r, in integers.

    flips: of A (1) and of B (2), which then reach the library as transposed. scaled: 3 A B + 2 C in its place,
    C real.
    """
    random = lambda i, *shape: mx.random.randint(-9, 10, shape, key=mx.random.key(i)).astype(mx.int64)  # noqa: E731

    def operand(i: int, rows: int, columns: int, flip: int) -> tuple[Any, Any, Any]:
        shape = (batch, columns, rows) if flip else (batch, rows, columns)
        real, imaginary = random(i, *shape), random(i + 1, *shape)
        if kind == mx.complex64:
            whole = real.astype(mx.float32) + imaginary.astype(mx.float32) * mx.array(1j)
        else:
            whole, imaginary = real.astype(kind), mx.zeros_like(imaginary)
        return tuple(mx.contiguous(x).swapaxes(1, 2) if flip else x for x in (whole, real, imaginary))  # type: ignore[return-value]

    a, a_real, a_imaginary = operand(1, m, k, flips & 1)
    b, b_real, b_imaginary = operand(3, k, n, flips & 2)
    r = random(5, 1, n)
    times = lambda x, y: (x * y[..., None, :]).sum(-1)  # noqa: E731  # matrices and a vector each, without BLAS
    x, y = times(b_real, r), times(b_imaginary, r)
    expected = times(a_real, x) - times(a_imaginary, y), times(a_real, y) + times(a_imaginary, x)
    c = random(6, batch, m, n)
    if scaled:
        expected = 3 * expected[0] + 2 * times(c, r), 3 * expected[1]
    product = mx.addmm(c.astype(kind), a, b, alpha=3.0, beta=2.0) if scaled else a @ b
    parts = (mx.real(product), mx.imag(product)) if kind == mx.complex64 else (product, mx.zeros_like(product))
    found = [times(part.astype(mx.int64), r) for part in parts]
    return all(mx.array_equal(e, f).item() for e, f in zip(expected, found, strict=True))


def _wrong_decomposition() -> str | None:
    x = mx.random.normal((96, 64), key=mx.random.key(7), stream=mx.cpu)
    square = x.T @ x + mx.eye(64)
    with mx.stream(mx.cpu):
        u, s, v = mx.linalg.svd(x)
        values, vectors = mx.linalg.eigh(square)
        q, r = mx.linalg.qr(x)
        lower = mx.linalg.cholesky(square)
        found = {
            "svd": ((u[:, :64] * s) @ v, x),
            "eigh": ((vectors * values) @ vectors.T, square),
            "qr": (q @ r, x),
            "cholesky": (lower @ lower.T, square),
            "inv": (mx.linalg.inv(square) @ square, mx.eye(64)),
        }
        for name, (made, wanted) in found.items():
            if not (mx.abs(made - wanted).max() <= 1e-3 * mx.abs(wanted).max()).item():
                return f"decomposes wrongly ({name})"
    return None


if __name__ == "__main__":
    judge(sys.argv[1])
