# SPDX-License-Identifier: Apache-2.0
"""Float32 products whose inputs are rounded to 10 bits of mantissa, as an M5 and NVIDIA cards make them: on any CPU.

A GPU may take the short way for one shape and not for another, so what is compared need not be rounded alike. Run in a
process of its own:

    python tests/tf32.py llama mixtral

prints a row of JSON for each, under a pretended M5: how far apart self-check and ways of generating find what is
right, whether they find faults, and what the user is told. "alike": all products are rounded; "apart": those
that the self-check compares with are not.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

BITS = 13  # of float32's mantissa that are lost
PLACES = ((mx, "matmul", 2), (mx, "addmm", 3), (mx, "quantized_matmul", 1), (mx, "gather_mm", 2), (mx, "gather_qmm", 1))
_rounding = False


def rounded(x: mx.array) -> mx.array:
    """float32 to the nearest number of 10 bits, ties to even; other dtypes as they are."""
    if x.dtype != mx.float32:
        return x
    bits = x.view(mx.uint32)
    bits = bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)
    return mx.where(mx.isfinite(x), (bits >> BITS << BITS).view(mx.float32), x)


def short(function: Callable[..., mx.array], count: int, least: int) -> Callable[..., mx.array]:
    """`function` of its first `count` arrays rounded, and its gradient made of rounded ones, where it has `least` rows.

    Inside `simulated` only; addmm's first array is added and stays as it is.
    """
    adds = function is _real["addmm"]

    def run(*arrays: Any, **options: Any) -> mx.array:
        given, rest = arrays[:count], arrays[count:]
        rows = given[adds].shape[-2] if given[adds].ndim > 1 else 1
        if not _rounding or rows < least or given[-1].dtype != mx.float32:
            return function(*arrays, **options)

        @mx.custom_function
        def product(*given: mx.array) -> mx.array:
            return function(*_all(given), *rest, **options)

        def _all(given: Any) -> list[mx.array]:
            return [x if adds and i == 0 else rounded(x) for i, x in enumerate(given)]

        @product.vjp
        def gradient(primals: Any, cotangent: Any, output: Any) -> Any:
            primals = primals if isinstance(primals, list | tuple) else [primals]
            plain = lambda *given: [function(*given, *rest, **options)]  # noqa: E731
            found = mx.vjp(plain, _all(primals), [rounded(cotangent)])[1]
            if adds:  # what is added gets all of it
                found[0] = mx.vjp(plain, list(primals), [cotangent])[1][0]
            return tuple(found) if len(found) > 1 else found[0]

        return product(*given)  # type: ignore[return-value]

    return run


_real: dict[str, Any] = {name: getattr(where, name) for where, name, _ in PLACES}
_real |= {"__matmul__": mx.array.__matmul__, "attention": mx.fast.scaled_dot_product_attention}


def _attention(least: int) -> Callable[..., mx.array]:
    def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any) -> mx.array:
        own = short(lambda q, k, v: _real["attention"](q, k, v, scale=scale, mask=mask, **options), 3, least)
        return own(q, k, v)

    return attend


@contextmanager
def simulated(least: int = 1) -> Iterator[None]:
    """Inside, float32 products of at least so many rows are made of rounded numbers."""
    global _rounding
    for where, name, count in PLACES:
        setattr(where, name, short(_real[name], count, least))
    array: Any = mx.array
    array.__matmul__ = short(_real["__matmul__"], 2, least)
    mx.fast.scaled_dot_product_attention = _attention(least)
    before, _rounding = _rounding, True
    try:
        yield
    finally:
        _rounding = before
        for where, name, _ in PLACES:
            setattr(where, name, _real[name])
        array.__matmul__, mx.fast.scaled_dot_product_attention = _real["__matmul__"], _real["attention"]


@contextmanager
def exact() -> Iterator[None]:
    """Inside, nothing is rounded."""
    global _rounding
    before, _rounding = _rounding, False
    try:
        yield
    finally:
        _rounding = before


# ------------------------------------------------------------------ what the package's checks find


def measured(folder: Path, *, apart: bool) -> dict[str, Any]:
    """Largest differences in the self-check (relative) and of the ways of generating (nats), and the lines told."""
    from mlx_realign import forward, selfcheck, selfcheck_reference, ways

    policy, by_mlx_lm = _policy(folder), selfcheck_reference.by_mlx_lm
    found: dict[str, Any] = {"notes": [*policy.notes]}
    forward.checkpoint_layers(policy.model)
    with simulated():
        try:
            if apart:
                selfcheck_reference.by_mlx_lm = lambda *given: exact()(by_mlx_lm)(*given)
            checks = selfcheck.run(policy)
        finally:
            selfcheck_reference.by_mlx_lm = by_mlx_lm
        found["notes"] += checks.notes
        exactly = [text.removeprefix("exact to ") for text in checks.results.values() if text.startswith("exact to ")]
        found["self-check"], found["results"] = max(map(float, exactly), default=None), checks.results
        found["way"], limits = ways.check(policy), dict(ways.LIMIT)
        policy.tried.clear()
        try:
            ways.LIMIT.update(dict.fromkeys(limits, -1.0))  # each then says by how much it differs
            ways.check(policy)
        finally:
            ways.LIMIT.update(limits)
        told = [re.fullmatch(r"log-probs differ by (\S+) nats", line or "") for line in policy.tried.values()]
        found["ways"] = max(float(match[1]) for match in told if match)
    policy.close()
    return found


def faults_found(folder: Path) -> dict[str, bool]:
    """Whether what is wrong is found, where it can be: a prompt one token off, a head's gradient 20% too long."""
    from mlx_realign import forward, selfcheck
    from mlx_realign.kernels import token_scores

    reader: Any = forward.PromptReader
    right, forms = reader.__init__, (token_scores._online, token_scores.narrow)

    def one_off(self: Any, *given: Any) -> None:
        right(self, *given)
        self.offset = self.offset + 1

    def too_long(form: Callable[..., list[mx.array]]) -> Callable[..., list[mx.array]]:
        def scores(*given: Any) -> list[mx.array]:
            *rows, slope = form(*given)
            return [*rows, 1.2 * slope]

        return scores

    policy = _policy(folder)
    reached = {"chunked_head": policy.body.head().rows is not None, "shared_prompts": policy.sharing}
    reader.__init__ = one_off
    token_scores._online, token_scores.narrow = map(too_long, forms)
    try:
        with simulated():
            found = selfcheck.run(policy).results
    finally:
        reader.__init__, (token_scores._online, token_scores.narrow) = right, forms
        policy.close()
    return {name: found[name].startswith("off: ") for name, there in reached.items() if there}


def _policy(folder: Path) -> Any:
    from mlx_realign.config import TrainSettings
    from mlx_realign.policy import Policy

    with simulated():  # kernels are checked when a policy is made
        return Policy.from_settings(TrainSettings(model=str(folder), data="x", lora_rank=4, lora_alpha=8.0))


def main(architectures: list[str]) -> int:
    """Measure architectures of the grid; a JSON row each."""
    import pretended_gpu

    pretended_gpu.DEVICE["architecture"] = "applegpu_g17s"
    pretended_gpu.begin()
    import grid_models

    os.environ.pop("MLX_ENABLE_TF32", None)  # which the tests set
    for arch in architectures:
        with tempfile.TemporaryDirectory() as home:
            folder = grid_models.write_folder(Path(home) / arch, arch)
            rows = {name: measured(folder, apart=name == "apart") for name in ("alike", "apart")}
            print(json.dumps({"arch": arch, "faults": faults_found(folder), **rows}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
