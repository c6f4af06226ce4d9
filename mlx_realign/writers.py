# SPDX-License-Identifier: Apache-2.0
"""The modules that write to the residual stream, found by running each decoder block, whatever their names are.

A writer is a module whose output moves what its block gives by a multiple of itself, entry by entry, while all other
layers as wide as the stream are silent: attention's and MLPs' last layers, every expert's, those of convolutions and
state spaces. Where a norm stands between it and the stream, each entry has a gain of its own, which is measured too.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import taps
from .adapter import adapters_of
from .adapter_layers import LINEAR, SWITCH, Adapter, Base, base_of, matrix_shape
from .adapter_targets import adaptable, names
from .errors import UserError
from .flags import nearest
from .policy import Policy

Kind = Literal["attention", "mlp", "experts"]

Said = mx.array | Callable[[mx.array], mx.array]  # what a layer is made to give: a vector [d], or a function of its own

TOKENS = 6
STATE_SIZE = 0.1  # root mean square of the states that blocks read: far above a norm's epsilon, far below a gain


@dataclass(frozen=True, eq=False)
class Writer:
    """A module that adds to the residual stream."""

    path: str
    block: int
    kind: Kind  # attention: whatever mixes tokens, convolutions and state spaces too; experts: all of a layer at once
    gain: np.ndarray | None  # float64 [d]: the stream gets a multiple of gain * output; None: of the output itself

    def basis(self, directions: np.ndarray) -> np.ndarray:
        """Orthonormal float64 [k, d]: what must go from the output, so that none of `directions` [k, d] gets through.

        With a gain g and one direction r it is norm(g * r), for r . (g * y) = (g * r) . y. A direction that depends on
        those before it is left out.
        """
        rows = np.atleast_2d(np.asarray(directions, np.float64))
        rows = rows if self.gain is None else rows * self.gain
        sizes = np.linalg.norm(rows, axis=1, keepdims=True)
        q, r = np.linalg.qr((rows / np.where(sizes > 0, sizes, 1)).T)
        kept = np.abs(np.diag(r)) > 1e-9
        return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T[kept]


class Rest(NamedTuple):
    """What a block adds to the stream although all writers that are known are silent, or lose a direction."""

    block: int
    share: float  # of the norm of what it adds otherwise (along the direction)
    modules: list[str]  # paths of its layers that are as wide as the stream and no writers


def find(policy: Policy, extra: Sequence[str] = ()) -> list[Writer]:
    """All writers, blocks in order, within a block in the order they are called.

    extra: names (`out_proj`, `mixer.out_proj`) or paths of more modules, which are taken for writers whatever they do.
    UserError for a name that no layer as wide as the stream has.
    """
    with _Bench(policy) as bench:
        bench.run({})
        _refuse_unknown(extra, bench)
        called = bench.called
        found: dict[str, np.ndarray | None] = {}
        waiting = [[p for p in called if bench.block_of[p] == b] for b in range(len(bench.blocks))]
        silence = bench.run(bench.silent).astype(np.float64)
        for step in range(max(map(len, waiting), default=0)):
            now = [paths[step] for paths in waiting if len(paths) > step]
            for path, (passes, gain) in _try(bench, now, silence).items():
                if passes or any(names(name, path) for name in extra):
                    found[path] = gain if passes else None
        mixing = _mixing(bench, list(found))
        kinds: dict[str, Kind] = {p: "attention" if p in mixing else "mlp" for p in found}
        kinds |= {path: "experts" for path in found if isinstance(bench.layers[path], SWITCH)}
        order = sorted(found, key=lambda path: (bench.block_of[path], called.index(path)))
        return [Writer(path, bench.block_of[path], kinds[path], found[path]) for path in order]


def rest(policy: Policy, writers: Sequence[Writer]) -> list[Rest]:
    """Blocks that write to the stream by other ways than `writers`; empty where all is known.

    With all writers silent a block must give a multiple of what it reads, and with a direction taken out of all of them
    nothing along it: what else it gives would hold a direction that was ablated from all writers.
    """
    known = {writer.path for writer in writers}
    with _Bench(policy) as bench:
        spoken = bench.run({})
        silent = bench.run({path: bench.zero for path in known})
        unit = np.array(bench.signs[0]) / np.sqrt(bench.width)
        bases = {writer.path: mx.array(writer.basis(unit).astype(np.float32)) for writer in writers}
        without = bench.run({path: _projection(basis) for path, basis in bases.items()})
        found = []
        for block, read in enumerate(np.array(bench.states)):
            kept = read * float((silent[block] * read).sum() / (read * read).sum())
            other, part, whole = silent[block] - kept, (without[block] - kept) @ unit, spoken[block] - kept
            shares = (_share(other, whole), _share(part, whole @ unit))
            if max(shares) > bench.tolerance:
                modules = [p for p, b in bench.block_of.items() if b == block and p not in known]
                found.append(Rest(block, max(shares), modules))
        return found


def _projection(basis: mx.array) -> Callable[[mx.array], mx.array]:
    return lambda y: (y.astype(mx.float32) - (y.astype(mx.float32) @ basis.T) @ basis).astype(y.dtype)


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(np.linalg.norm(part) / max(float(np.linalg.norm(whole)), 1e-30))


# ------------------------------------------------------------------ running blocks


class _Bench:
    """All decoder blocks side by side: each reads random states of its own, and layers can be told what to give."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.model = policy, policy.model
        self.blocks = taps.blocks(self.model)
        self.stack = ExitStack()
        self.given: Mapping[str, Said] = {}
        self.heard: dict[str, mx.array] = {}  # what layers would give, by path, in the order of their calls
        self.out: dict[int, mx.array] = {}
        keys = mx.random.split(mx.random.key(0), 3)
        self.tokens = mx.random.randint(0, policy.vocabulary, (1, TOKENS), key=keys[0])
        self.states = mx.zeros(0)
        for i, path in enumerate(self.blocks):
            self._tap(path, lambda x, _, i=i: self._feed(x, i), before=True)
            self._tap(path, lambda x, _, i=i: self._catch(x, i))
        self.policy.body.hidden(self.tokens)
        first = self.out[0]
        self.width = first.shape[-1]
        if first.shape != (1, TOKENS, self.width):
            self.stack.close()
            raise UserError(
                f"--model {policy.name}: its blocks pass on an array {first.shape}, not one vector per token: what "
                "writes to such a stream cannot be told."
            )
        self.states = STATE_SIZE * mx.random.normal((len(self.blocks), TOKENS, self.width), key=keys[1])
        self.states = self.states.astype(first.dtype).astype(mx.float32)
        self.tolerance = 5e-3 if first.dtype == mx.float32 else 5e-2
        self.zero = mx.zeros(self.width)
        half = self.width // 2
        signs = mx.concatenate([mx.ones(half), -mx.ones(self.width - half)])
        self.signs = [signs[mx.random.permutation(self.width, key=key)] for key in mx.random.split(keys[2])]
        self.layers = _candidates(self.model, self.width)
        self.block_of = {p: i for p in self.layers for i, b in enumerate(self.blocks) if p.startswith(b + ".")}
        for path in self.block_of:
            self._tap(path, lambda y, _, path=path: self._say(y, path))
        self.silent: dict[str, Said] = dict.fromkeys(self.block_of, self.zero)

    def __enter__(self) -> "_Bench":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def run(self, given: Mapping[str, Said]) -> np.ndarray:
        """What the blocks give, float32 [blocks, T, d], while the layers in `given` give what it says."""
        self.given = given
        self.heard.clear()
        self.policy.body.hidden(self.tokens)
        return np.array(mx.stack([self.out[i].astype(mx.float32).reshape(TOKENS, -1) for i in range(len(self.blocks))]))

    @property
    def called(self) -> list[str]:
        """Layers in the order of their calls in the last run."""
        return list(self.heard)

    def _tap(self, path: str, tap: taps.Tap, before: bool = False) -> None:
        self.stack.callback(taps.put(self.model, path, tap, before=before).remove)

    def _feed(self, x: mx.array, block: int) -> mx.array:
        return mx.broadcast_to(self.states[block], x.shape).astype(x.dtype) if self.states.size else x

    def _catch(self, x: mx.array, block: int) -> mx.array:
        self.out[block] = x
        return x

    def _say(self, y: mx.array, path: str) -> mx.array:
        self.heard[path], said = y, self.given.get(path)
        if isinstance(said, mx.array):
            return mx.broadcast_to(said, y.shape).astype(y.dtype)
        return said(y) if said else y


def _candidates(model: nn.Module, width: int) -> dict[str, Base]:
    """Path -> layer (the base of an adapted one) of all linear and expert layers with `width` outputs."""
    adapted = adapters_of(model)
    inside = tuple(path + "." for path in adapted)
    layers = {path: layer for path, layer in adaptable(model).items() if not (inside and path.startswith(inside))}
    layers |= {path: base_of(layer) for path, layer in adapted.items()}
    return {p: layer for p, layer in layers.items() if isinstance(layer, LINEAR + SWITCH) and outputs(layer) == width}


def outputs(layer: Base) -> int:
    """Number of entries that a linear layer, or each expert, gives."""
    return layer.output_dims if isinstance(layer, SWITCH) else matrix_shape(layer)[0]


# ------------------------------------------------------------------ judging


def _try(bench: _Bench, paths: list[str], silence: np.ndarray) -> dict[str, tuple[bool, np.ndarray | None]]:
    """For one layer of each block: whether what it gives passes into the stream, and with which gain."""

    def move(vector: mx.array) -> np.ndarray:
        return bench.run({**bench.silent, **dict.fromkeys(paths, vector)}).astype(np.float64) - silence

    one, two = bench.signs
    first = move(one)
    moved = {path: bool(np.any(first[bench.block_of[path]])) for path in paths}
    if not any(moved.values()):
        return {path: (False, None) for path in paths}
    second, threefold = move(two), move(3 * one)
    found = {}
    for path in paths:
        block = bench.block_of[path]
        answers = np.stack([first[block] * np.array(one), second[block] * np.array(two)])  # [2, T, d]: c * gain
        found[path] = (False, None)
        if moved[path] and (gain := _gain(answers, bench.tolerance)) is not None:
            normed = np.linalg.norm(threefold[block]) < 2 * np.linalg.norm(first[block])
            plain = not normed and np.abs(gain - 1).max() < bench.tolerance / 5
            found[path] = True, None if plain else _exactly(bench, block, gain)
    return found


def _gain(answers: np.ndarray, tolerance: float) -> np.ndarray | None:
    """What all answers [2, T, d] are multiples of, float64 [d] with root mean square 1; None where they are not."""
    sizes = np.sqrt((answers**2).mean(-1, keepdims=True))
    if not np.isfinite(sizes).all() or sizes.min() == 0:
        return None
    unit = answers / sizes
    unit = unit * np.sign(unit.sum(-1, keepdims=True))
    gain = unit.mean((0, 1))
    return gain if np.sqrt(((unit - gain) ** 2).mean(-1)).max() < tolerance else None


def _exactly(bench: _Bench, block: int, gain: np.ndarray) -> np.ndarray | None:
    """The gain without the stream's rounding: that of a norm of the block, where one has it; None where it is 1."""
    modules = dict(bench.model.named_modules())
    signs, best = bench.signs[0], (bench.tolerance, gain)
    for path, module in modules.items():
        weight = module.get("weight")
        if not path.startswith(bench.blocks[block] + ".") or weight is None or weight.shape != (bench.width,):
            continue
        applied: Any = module
        own = np.array(applied(signs[None, None])[0, 0].astype(mx.float32) * signs).astype(np.float64)
        own = own / max(float(np.sqrt((own**2).mean())), 1e-30)
        difference = float(np.sqrt(((own - gain) ** 2).mean()))
        best = min(best, (difference, own), key=lambda pair: pair[0])
    found = best[1]
    return None if np.ptp(found) < 1e-6 else found


def _mixing(bench: _Bench, paths: list[str]) -> set[str]:
    """Writers whose output at a token depends on the token before, all other writers of their block being silent."""
    by_block = [[path for path in paths if bench.block_of[path] == block] for block in range(len(bench.blocks))]
    changed, usual, found = bench.states * 1, bench.states, set()
    changed[:, -2] = -changed[:, -2] + 0.5 * STATE_SIZE
    for step in range(max(map(len, by_block), default=0)):
        now = [some[step] for some in by_block if len(some) > step and not isinstance(bench.layers[some[step]], SWITCH)]
        silent = {path: bench.zero for path in paths if path not in now}
        heard = []
        for states in (usual, changed):
            bench.states = states
            bench.run(silent)
            heard.append({path: np.array(bench.heard[path].astype(mx.float32))[..., -1, :] for path in now})
        bench.states = usual
        found |= {path for path in now if not np.array_equal(heard[0][path], heard[1][path])}
    return found


def _refuse_unknown(extra: Sequence[str], bench: _Bench) -> None:
    for name in extra:
        if not any(names(name, path) for path in bench.called):
            known = sorted({path.rpartition(".")[2] for path in bench.called})
            raise UserError(
                f"--writers {name}: no layer that gives {bench.width} numbers, as the stream has, is called so."
                f"{nearest(name, known)} There are: {', '.join(known)}."
            )


def module_at(model: nn.Module, path: str) -> Base:
    """The layer at a writer's path, inside its adapter where it has one."""
    module = dict(model.named_modules())[path]
    return base_of(module) if isinstance(module, Adapter) else module
