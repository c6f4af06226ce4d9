# SPDX-License-Identifier: Apache-2.0
"""mlx-lm and this package believe that a Metal GPU is there, and arithmetic runs on the CPU.

`begin()` before mlx_lm is imported, since models make their kernels then: custom kernels become stand-ins that compute
by mlx-lm's plain operations, and raise where a gradient passes through them. Run in a process of its own:

    python tests/pretended_gpu.py kimi_linear qwen3_5,linear_key_head_dim=128

prints a row of JSON for each: cells of the grid, kernels met, traces, dtypes for which the head has the form of a GPU.
Settings of config.json may follow a name, and quantized=4: the model in 4-bit bfloat16, as grid_packed.py measures it.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

DEVICE = {
    "device_name": "Apple M4 Max",
    "architecture": "applegpu_g16s",
    "memory_size": 64 << 30,
    "max_recommended_working_set_size": 48 << 30,
    "max_buffer_length": 36 << 30,
    "resource_limit": 499_000,
}
met: Counter[str] = Counter()  # kernels that were called, by name
_on = True


class KernelHasNoGradient(Exception):
    """A gradient went through a kernel that has none: on a GPU training ends there."""


@contextmanager
def off() -> Iterator[None]:
    """Inside there is no GPU: for what is compared with."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def begin() -> None:
    """From here on there is a GPU."""
    real = {name: getattr(mx, name) for name in ("default_device", "default_stream", "new_stream", "stream")}
    made = mx.new_thread_local_stream

    def on_cpu(where: Any) -> Any:
        kind = getattr(where, "type", where)
        return mx.cpu if kind in (mx.gpu, mx.DeviceType.gpu) and isinstance(where, mx.Device | mx.DeviceType) else where

    changed: dict[str, Any] = {
        "default_device": lambda: mx.Device(mx.gpu) if _on else real["default_device"](),
        "default_stream": lambda where: real["default_stream"](on_cpu(where)),
        "new_stream": lambda where: real["new_stream"](on_cpu(where)),
        "new_thread_local_stream": lambda where: made(on_cpu(where)),
        "device_info": lambda *_: dict(DEVICE),
        "set_wired_limit": lambda _: 0,
    }
    for name, value in changed.items():
        setattr(mx, name, value)
    mx.metal.is_available = lambda: _on
    mx.fast.metal_kernel = stand_in
    mx.gather_mm = in_float32(mx.gather_mm)


def in_float32(operation: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """What a CPU has in float32 alone: computed so, and rounded as a GPU would."""

    def compute(a: mx.array, b: mx.array, /, *rest: Any, **named: Any) -> mx.array:
        dtype = mx.result_type(a, b)
        return operation(a.astype(mx.float32), b.astype(mx.float32), *rest, **named).astype(dtype)

    return compute


def stand_in(name: str, **_: Any) -> Callable[..., list[mx.array]]:
    """What is called in the place of a kernel of that name."""

    def kernel(*, inputs: list[Any], output_dtypes: list[mx.Dtype], **_: Any) -> list[mx.array]:
        plain = PLAIN.get(name.removesuffix("_mask").removesuffix("_vec"))
        if plain is None:
            raise LookupError(f"kernel {name}: PLAIN has nothing that stands in for it")
        met[name] += 1
        arrays = [x for x in inputs if isinstance(x, mx.array)]

        @mx.custom_function
        def compute(*arrays: mx.array) -> list[mx.array]:
            return [y.astype(dtype) for y, dtype in zip(plain(*arrays), output_dtypes, strict=True)]

        @compute.vjp
        def refuse(primals: Any, cotangents: Any, outputs: Any) -> Any:
            raise KernelHasNoGradient(name)

        return list(compute(*arrays))  # type: ignore[call-overload]

    return kernel


def _gated_delta(*arrays: mx.array) -> Any:
    from mlx_lm.models import gated_delta

    return gated_delta.gated_delta_ops(*arrays)


def _wkv7(*arrays: mx.array) -> Any:
    from mlx_lm.models import rwkv7

    r, w, k, v, a, b, state = arrays
    ys = []
    for t in range(r.shape[1]):
        y, state = rwkv7._wkv7_step_ops(r[:, t], w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], state)
        ys.append(y)
    return mx.stack(ys, 1).reshape(r.shape), state


def _ssm(x: mx.array, A_log: mx.array, B: mx.array, C: mx.array, D: mx.array, dt: mx.array, state: mx.array) -> Any:
    heads = x.shape[2]
    B, C = (mx.repeat(y[:, 0], heads // y.shape[2], 1) for y in (B, C))  # [n, H, Ds]
    x, dt = x[:, 0], dt.reshape(x.shape[0], heads, 1)
    state = state * mx.exp(-mx.exp(A_log)[:, None] * dt)[..., None] + (dt * x)[..., None] * B[:, :, None]
    return ((state * C[:, :, None]).sum(-1) + D[:, None] * x)[:, None], state


def _attention_residual(*arrays: mx.array) -> Any:
    from mlx_lm.models import kimi_k3

    return [kimi_k3._attn_res_combine(*arrays)]


PLAIN: dict[str, Callable[..., Any]] = {
    "gated_delta_step": _gated_delta,
    "gated_delta_step_packed_btree": _gated_delta,
    "wkv7_kernel": _wkv7,
    "ssm_kernel": _ssm,
    "attnres_mix": _attention_residual,
}


def configured(named: str) -> str:
    """The architecture of the grid in `name,key=value,...`, these settings in its config."""
    import grid_models

    arch, *own = named.split(",")
    settings = dict(setting.split("=") for setting in own)
    grid_models.CONFIGS["models"][arch] |= {key: json.loads(value) for key, value in settings.items()}
    return arch


def row(named: str) -> dict[str, Any]:
    """What is found of an architecture of the grid, settings of its config.json behind it; `begin()` comes first."""
    import grid_models
    from grid_checks import measure
    from grid_packed import packed

    grid_models.elsewhere = off
    plain = ",".join(part for part in named.split(",") if part != "quantized=4")
    how, arch = (measure if plain == named else packed), configured(plain)
    met.clear()
    with tempfile.TemporaryDirectory() as folder:
        found = how(arch, Path(folder) / arch)
    from mlx_realign.kernels import token_scores

    proven = [str(dtype) for dtype in token_scores.proven]
    return {"arch": named, "kernels": dict(met), "scores": proven, **found}


def facts(folder: Path) -> dict[str, Any]:
    """What the package does for a GPU and not for a CPU, as it takes it of the device; of a policy over that folder."""
    from mlx_realign.config import TrainSettings
    from mlx_realign.kernels import attention, swiglu, token_scores
    from mlx_realign.policy import Policy

    policy = Policy.from_settings(TrainSettings(model=str(folder), data="x"))
    policy.prepare_for(frozenset())
    taken: list[int] = []

    class Seen(token_scores.Weight):
        def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
            taken.append(stop - start)
            return super().logits(hidden, start, stop)

    rows = Seen({"weight": mx.ones((4096, 8))}, {})
    head = token_scores.Head(lambda h: h @ rows.tensors["weight"].T, 4096, rows)
    token_scores.fused(head, mx.ones((256, 8)), mx.zeros(256, mx.int32))
    return {
        "workers": policy.workers.count,
        "compiled": policy.compiled,
        "dtype": str(policy.dtype),
        "kernels": [attention.available(), swiglu.available()],
        "slices": taken,
    }


def main(architectures: list[str]) -> int:
    """Measure architectures of the grid; a JSON row each."""
    begin()
    for named in architectures:
        print(json.dumps(row(named)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
