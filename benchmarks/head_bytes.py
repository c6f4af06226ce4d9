# SPDX-License-Identifier: Apache-2.0
"""Count what each form of the token scores (kernels/token_scores.py) moves through a GPU's memory; no GPU is needed.

    python benchmarks/head_bytes.py [--gradient off] [--peak]

Forms: "float32", slices of the vocabulary in float32, as a CPU has them; "rows", slices of tokens with all of their
logits at once and the gradient of mx.fast.cross_entropy; "narrow", slices of the vocabulary in the logits' dtype.
Each is traced over shapes alone and its graph walked, as mx.compile fuses it ("eager": as it is): every kernel reads
each of its inputs once and writes its outputs once; views cost nothing; what is gathered costs what is taken. The
number of kernels is that of the graph that mx.compile makes. mx.fast.cross_entropy, one kernel on a GPU and many on a
CPU, is stood in for by one operation that reads and writes the same. Time is the sum of bytes / 546 GB/s, flops / 34
TFLOP/s and 5 us a kernel (an M4 Max; overlap and caches left out): a measure to choose by, not a claim of speed.

--peak measures, here, how much memory a small case of each form takes with slices as a GPU has them. This machine
computes mx.fast.cross_entropy by plain operations, which need float32 copies of 16-bit logits that a GPU does not.
"""

import argparse
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_realign.kernels import token_scores
from mlx_realign.kernels.token_scores import Weight

BANDWIDTH, FLOPS, LAUNCH = 546e9, 34e12, 5e-6
VOCABULARIES, WIDTHS, TOKENS = (49152, 151936, 262144), (576, 2048, 4096), (64, 512, 4096)
SHAPES = set("Squeeze ExpandDims Reshape Transpose Broadcast Depends StopGradient Full".split())  # cost nothing
GATHERS = {"Gather", "GatherAxis"}
ELEMENTWISE = set(
    "AsType Subtract Add Multiply Divide Negative Exp Log Maximum Minimum LogAddExp Select Square".split()
)
ELEMENTWISE |= set("Equal Less Greater GreaterEqual LessEqual BitwiseBinary".split())
Node = dict[str, Any]
Form = Callable[..., list[mx.array]]


@dataclass
class Count:
    """What one pass over the head moves and computes."""

    bytes: float = 0.0
    launches: int = 0
    flops: float = 0.0

    @property
    def seconds(self) -> float:
        return self.bytes / BANDWIDTH + self.flops / FLOPS + self.launches * LAUNCH


class Case(NamedTuple):
    """A head and how much is asked of it. bits: 0 where the weight is dense."""

    tokens: int
    vocabulary: int
    width: int
    dtype: mx.Dtype
    bits: int
    gradient: bool = True

    def arrays(self, make: Callable[..., mx.array]) -> list[mx.array]:
        """Hidden states, tokens, and the tensors of the weight."""
        rows, size = self.vocabulary, self.width
        packed = [make((rows, size * self.bits // 32), mx.uint32), *[make((rows, size // 64), self.dtype)] * 2]
        dense = [make((rows, size), self.dtype)]
        given = [make((self.tokens, size), self.dtype), make((self.tokens,), mx.int32)]
        return [*given, *(packed if self.bits else dense)]

    def bound(self, form: Form) -> Callable[..., list[mx.array]]:
        """`form` as a function of those arrays."""

        def run(hidden: mx.array, tokens: mx.array, *tensors: mx.array) -> list[mx.array]:
            options = {"group_size": 64, "bits": self.bits, "mode": "affine"} if self.bits else {}
            weight = Weight(dict(zip(("weight", "scales", "biases"), tensors, strict=False)), options)
            return form(weight, self.vocabulary, hidden, tokens, self.gradient, False)

        return run


def rows(weight: Weight, vocabulary: int, h: mx.array, tokens: mx.array, gradient: bool, _: bool) -> list[mx.array]:
    """The form that was weighed against `narrow`: as many tokens at once as GPU_SLICE_BYTES hold the logits of."""
    chunk = max(16, token_scores.GPU_SLICE_BYTES // (h.dtype.size * vocabulary))
    parts: list[list[mx.array]] = []
    for start in range(0, tokens.shape[0], chunk):
        x, target = h[start : start + chunk], tokens[start : start + chunk]
        if parts:
            (x,) = mx.depends([x], parts[-1])
        logits = weight.logits(x, 0, vocabulary)
        if gradient:
            loss, slope = loss_and_slope(logits, target)
            back = -weight.back(slope, 0, vocabulary)
        else:
            loss, back = mx.fast.cross_entropy(logits, target), mx.array(0.0)
        lse = loss[:, None] + mx.take_along_axis(logits, target[:, None], 1).astype(mx.float32)
        hit = (logits.argmax(-1) == target).astype(mx.float32)
        parts.append([-loss, token_scores._entropy(logits, lse)[:, 0], hit, back])
    return [mx.concatenate([*column]) if column[0].ndim else column[0] for column in zip(*parts, strict=True)]


def loss_and_slope(logits: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """Cross entropies [n] and their gradients [n, V], by the function's own gradient."""
    one = mx.ones((target.shape[0],))
    (loss,), (slope,) = mx.vjp(lambda z: [mx.fast.cross_entropy(z, target)], [logits], [one])
    return loss, slope


FORMS: dict[str, Form] = {"float32": token_scores._online, "rows": rows, "narrow": token_scores.narrow}


# ------------------------------------------------------------------ counting


@dataclass
class Operation:
    """One primitive: arrays that it reads and makes, by the name of the array that holds their numbers."""

    name: str
    given: list[str]
    made: list[str]
    flops: float
    kernel: int = -1
    users: list["Operation"] = field(default_factory=list)


def counted(case: Case, form: Form, *, fused: bool = True) -> Count:
    """One pass, gradient of the hidden states included. fused: as mx.compile has it, else operation by operation."""
    run, given = case.bound(form), case.arrays(lambda shape, dtype: mx.broadcast_to(mx.array(0, dtype), shape))
    with stood_in():
        nodes: list[Node] = []
        mx.export_function(nodes.append, run, *given)
        count = walked([node for node in nodes if node["type"] == "primitive"], fused)
        if fused:  # numbers of a row each are cut into more kernels than it seems here
            count.launches = kernels_of(mx.compile(run)(*given))
        return count


@contextmanager
def stood_in() -> Iterator[None]:
    """Inside there is a GPU, and operations that move as much stand for mx.fast.cross_entropy and mx.dequantize."""
    global loss_and_slope
    real = mx.fast.cross_entropy, mx.default_device, loss_and_slope, mx.dequantize
    mx.fast.cross_entropy = lambda logits, targets, **_: mx.max(logits, -1)
    mx.default_device = lambda: mx.Device(mx.gpu)
    loss_and_slope = lambda logits, target: (mx.max(logits, -1), mx.sort(logits, -1))  # noqa: E731
    mx.dequantize = lambda w, scales, biases, **given: mx.concatenate([w] * (32 // given["bits"]), -1).astype(
        scales.dtype
    )
    try:
        yield
    finally:
        mx.fast.cross_entropy, mx.default_device, loss_and_slope, mx.dequantize = real


def walked(nodes: list[Node], fused: bool) -> Count:
    """Bytes, kernels and flops of primitives, which come in the order in which they run."""
    operations, size = resolved(nodes, fused)
    maker = {name: operation for operation in operations for name in operation.made}
    for operation in operations:
        for name in operation.given:
            if name in maker:
                maker[name].users.append(operation)
    for number, operation in enumerate(reversed(operations)):  # in the kernel of all that read it, or in one of its own
        others = {user.kernel for user in operation.users if user.name in ELEMENTWISE}
        inside = fused and operation.name in ELEMENTWISE and len(others) == 1
        inside = inside and all(user.name in ELEMENTWISE for user in operation.users)
        operation.kernel = others.pop() if inside else number
    count, moved = Count(), set()
    for operation in operations:
        count.flops += operation.flops
        own = operation.kernel
        if operation.name == "Slice":
            continue
        if operation.name in GATHERS:
            count.bytes += sum(size[name] for name in operation.made)  # what is taken of the first array
            moved |= {(own, name) for name in (*operation.given[1:2], *operation.made)}
            continue
        moved |= {(own, name) for name in operation.given if name not in maker or maker[name].kernel != own}
        if not operation.users or any(user.kernel != own for user in operation.users):
            moved |= {(own, name) for name in operation.made}
    count.bytes += sum(size[name] for _, name in moved)
    count.launches = len({operation.kernel for operation in operations if operation.name != "Slice"})
    return count


def resolved(nodes: list[Node], merged: bool) -> tuple[list[Operation], dict[str, int]]:
    """Operations without those that change a shape only, and the bytes of each array; merged: equal ones are one."""
    source: dict[str, str] = {}
    size: dict[str, int] = {}
    known: dict[Any, list[str]] = {}
    operations: list[Operation] = []
    for node in nodes:
        inputs: list[str] = [name for name, _, _ in node["inputs"]]
        given = [source.get(name, name) for name in inputs]
        made: list[str] = [name for name, _, _ in node["outputs"]]
        for (_, shape, dtype), origin in zip(node["inputs"], given, strict=True):
            size.setdefault(origin, math.prod(shape) * dtype.size)
        same = known.setdefault((node["name"], str(node["arguments"]), *given), made) if merged else made
        if node["name"] in SHAPES:
            source.update(zip(made, given, strict=False))
        elif same is not made:
            source.update(zip(made, same, strict=True))
        else:
            size |= {name: math.prod(shape) * dtype.size for name, shape, dtype in node["outputs"]}
            operations.append(Operation(node["name"], given, made, flops_of(node)))
    return operations, size


def flops_of(node: Node) -> float:
    if node["name"] not in ("Matmul", "QuantizedMatmul"):
        return 0.0
    return 2.0 * math.prod(node["outputs"][0][1]) * node["inputs"][0][1][-1]


def kernels_of(outputs: list[mx.array]) -> int:
    """Operations of a graph that are no views."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *outputs)
        names = re.findall(r'label ="([^"]*)"', path.read_text())
    return sum(name.split()[0] not in SHAPES | {"Slice"} for name in names)


# ------------------------------------------------------------------ measuring memory, printing


def peak(case: Case, form: Form) -> float:
    """GB that a pass takes here beside what it is given, with slices as a GPU has them."""
    given = case.arrays(lambda shape, dtype: mx.zeros(shape, dtype))
    mx.eval(given)
    on_cpu, token_scores.on_cpu = token_scores.on_cpu, lambda: False
    try:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(case.bound(form)(*given))
        return (mx.get_peak_memory() - before) / 1e9
    finally:
        token_scores.on_cpu = on_cpu


def main() -> None:
    """Print a row for each head and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient", choices=["on", "off"], default="on")
    parser.add_argument("--peak", action="store_true", help="memory of small cases, instead")
    args = parser.parse_args()
    gradient = args.gradient == "on"
    if args.peak:
        for dtype, bits in product((mx.float32, mx.bfloat16), (0, 4)):
            case = Case(1024, 49152, 64, dtype, bits, gradient)
            found = "  ".join(f"{name} {peak(case, form):.3f} GB" for name, form in FORMS.items())
            print(f"{head_of(case)}  {found}", flush=True)
        return
    print("bytes per (token, entry), kernels, ms by the sum above")
    columns = {"float32, eager": (FORMS["float32"], False), **{name: (form, True) for name, form in FORMS.items()}}
    print(f"{'':34}" + "".join(f"{name:>24}" for name in columns))
    for dtype, bits, *sizes in product((mx.bfloat16, mx.float32), (0, 4), VOCABULARIES, WIDTHS, TOKENS):
        case = Case(sizes[2], sizes[0], sizes[1], dtype, bits, gradient)
        cells = [counted(case, form, fused=fused) for form, fused in columns.values()]
        entries = case.tokens * case.vocabulary
        row = [f"{one.bytes / entries:8.1f} {one.launches:5} {one.seconds * 1e3:9.2f}" for one in cells]
        print(f"{head_of(case):34}" + "".join(row), flush=True)


def head_of(case: Case) -> str:
    kind = f"{case.bits}-bit" if case.bits else "dense"
    name = str(case.dtype).removeprefix("mlx.core.")
    return f"{name:9}{kind:6}V {case.vocabulary:<7}D {case.width:<5}N {case.tokens:<5}"


if __name__ == "__main__":
    main()
