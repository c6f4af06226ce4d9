# SPDX-License-Identifier: Apache-2.0
"""The modules that write to the residual stream, found by running each decoder block, whatever their names are.

A writer is a module whose output moves what its block gives by a multiple of itself, entry by entry, while all other
layers as wide as the stream are silent: attention's and MLPs' last layers, every expert's, those of convolutions and
state spaces. Where a norm stands between it and the stream, each entry has a gain of its own, which is measured too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import noise
from .adapter_layers import Adapter, Base, base_of
from .adapter_targets import names
from .bench import STATE_SIZE, TOKENS, Bench
from .errors import UserError
from .flags import nearest
from .policy import Policy

Kind = Literal["attention", "mlp", "experts"]

FAR = 1e4  # an output beside which states, and what a norm makes of them, are next to nothing


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
        kept = np.abs(np.diag(r)) > 1e-6  # directions come from float32 states
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
    with Bench(policy) as bench:
        bench.run({})
        _refuse_unknown(extra, bench)
        called = {path: i for i, path in enumerate(bench.called)}
        found: dict[str, np.ndarray | None] = {}
        waiting = [bench.groups(b) for b in range(len(bench.blocks))]
        silence = bench.run(bench.silent).astype(np.float64)
        for step in range(max(map(len, waiting), default=0)):
            now = [groups[step] for groups in waiting if len(groups) > step]
            for group, (passes, gain) in _try(bench, now, silence).items():
                for path in group:
                    if passes or any(names(name, path) for name in extra):
                        found[path] = gain if passes else None
        mixing = _mixing(bench, list(found))
        kinds: dict[str, Kind] = {p: "attention" if p in mixing else "mlp" for p in found}
        kinds |= {path: "experts" for path in found if path in bench.experts}
        order = sorted(found, key=lambda path: (bench.block_of[path], called.get(path, len(called)), path))
        return [Writer(path, bench.block_of[path], kinds[path], found[path]) for path in order]


def rest(policy: Policy, writers: Sequence[Writer]) -> list[Rest]:
    """Blocks that write to the stream by other ways than `writers`; empty where all is known.

    With all writers silent a block must give a multiple of what it reads, at each token one of its own. With a
    direction taken out of all of them, and of what the block reads, it must give nothing along it: what else it gives
    would hold a direction that was ablated from all writers.
    """
    known = {writer.path for writer in writers}
    with Bench(policy) as bench:
        spoken = bench.run({})
        silent = bench.run({path: bench.zero for path in known})
        read, unit = np.array(bench.states), np.array(bench.signs[0]) / np.sqrt(bench.width)
        bases = {writer.path: mx.array(writer.basis(unit).astype(np.float32)) for writer in writers}
        bench.states = bench.states - (bench.states @ mx.array(unit))[..., None] * mx.array(unit)
        without = bench.run({path: _projection(basis) for path, basis in bases.items()}) @ unit
        found = []
        for block, states in enumerate(read):
            shares = (silent[block] * states).sum(-1, keepdims=True) / (states * states).sum(-1, keepdims=True)
            kept = states * shares
            whole = spoken[block] - kept
            shares = (_share(silent[block] - kept, whole), _share(without[block], whole @ unit))
            if max(shares) > bench.tolerance:
                modules = [p for p, b in bench.block_of.items() if b == block and p not in known]
                found.append(Rest(block, max(shares), modules))
        return found


def _projection(basis: mx.array) -> Callable[[mx.array], mx.array]:
    return lambda y: (y.astype(mx.float32) - (y.astype(mx.float32) @ basis.T) @ basis).astype(y.dtype)


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(np.linalg.norm(part) / max(float(np.linalg.norm(whole)), 1e-30))


# ------------------------------------------------------------------ judging


Groups = list[tuple[str, ...]]


def _try(bench: Bench, groups: Groups, silence: np.ndarray) -> dict[tuple[str, ...], tuple[bool, np.ndarray | None]]:
    """For one group of each block: whether what it gives passes into the stream, and with which gain.

    Where it does not, it may do so beside other ways, through a norm to experts that give back what they read, say:
    with an output far above all that norms let through, those are next to nothing.
    """

    def move(vector: mx.array) -> np.ndarray:
        paths = [path for group in groups for path in group]
        return bench.run({**bench.silent, **dict.fromkeys(paths, vector)}).astype(np.float64) - silence

    one, two = bench.signs
    found: dict[tuple[str, ...], tuple[bool, np.ndarray | None]] = dict.fromkeys(groups, (False, None))
    left = {group: bench.block_of[group[0]] for group in groups}
    for size in (1.0, FAR):
        first = move(size * one)
        left = {group: block for group, block in left.items() if np.any(first[block])}
        if not left:
            break
        second, threefold = move(size * two), move(3 * size * one)
        for group, block in list(left.items()):
            answers = np.stack([first[block] * np.array(one), second[block] * np.array(two)])  # [2, T, d]: c * gain
            if (gain := _gain(answers, bench.tolerance)) is None:
                continue
            normed = np.linalg.norm(threefold[block]) < 2 * np.linalg.norm(first[block])
            if normed and size == FAR:  # the other ways are as large as this one
                continue
            plain = not normed and np.abs(gain - 1).max() < bench.tolerance / 5
            found[group] = True, None if plain else _exactly(bench, block, gain)
            del left[group]
    return found


def _gain(answers: np.ndarray, tolerance: float) -> np.ndarray | None:
    """What all answers [2, T, d] are multiples of, float64 [d] with root mean square 1; None where they are not.

    Tokens that do not answer do not count: they are routed elsewhere.
    """
    sizes = np.sqrt((answers**2).mean(-1, keepdims=True))
    if not np.isfinite(sizes).all():
        return None
    heard = sizes[..., 0] > 1e-3 * sizes.max()
    if not heard.any(1).all():
        return None
    unit = answers[heard] / sizes[heard]
    unit = unit * np.sign(unit.sum(-1, keepdims=True))
    gain = unit.mean(0)
    return gain if np.sqrt(((unit - gain) ** 2).mean(-1)).max() < tolerance else None


def _exactly(bench: Bench, block: int, gain: np.ndarray) -> np.ndarray | None:
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


def _mixing(bench: Bench, paths: list[str]) -> set[str]:
    """Writers whose output at a token depends on the token before, all other writers of their block being silent.

    One that gives the same at every token, whatever the block reads, has weights of zero before it, as models have
    that nobody trained: it is asked again with noise in their place.
    """
    asked = [path for path in paths if path not in bench.experts]
    found, deaf = _depending(bench, paths, asked)
    if deaf:
        with _noise_for_zeros(bench.model, [bench.blocks[bench.block_of[path]] for path in deaf]):
            found |= _depending(bench, paths, deaf)[0]
    return found


def _depending(bench: Bench, paths: list[str], asked: list[str]) -> tuple[set[str], list[str]]:
    """(those whose output at a token depends on the token before, those whose output depends on nothing)."""
    by_block = [[path for path in asked if bench.block_of[path] == block] for block in range(len(bench.blocks))]
    changed, usual = bench.states * 1, bench.states
    changed[:, -2] = -changed[:, -2] + 0.5 * STATE_SIZE
    found, deaf = set(), []
    for step in range(max(map(len, by_block), default=0)):
        now = [some[step] for some in by_block if len(some) > step]
        silent = {path: bench.zero for path in paths if path not in now}
        heard = []
        for states in (usual, changed):
            bench.states = states
            bench.run(silent)
            heard.append({p: np.array(bench.heard[p].astype(mx.float32)).reshape(TOKENS, -1) for p in now})
        bench.states = usual
        for path in now:
            one, other = heard[0][path], heard[1][path]
            rounding = noise.of(one, other)
            found |= {path} if not noise.only(one[-1] - other[-1], rounding) else set()
            deaf += [path] if noise.only(one - other, rounding) else []
    return found, deaf


@contextmanager
def _noise_for_zeros(model: nn.Module, blocks: list[str]) -> Iterator[None]:
    """Inside, parameters of these blocks that are all zero are small and random."""
    inside = tuple(block + "." for block in blocks)
    tensors: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # pyright: ignore
    zeros = [(p, x) for p, x in tensors if p.startswith(inside) and mx.issubdtype(x.dtype, mx.floating)]
    zeros = [(path, x) for path, x in zeros if not mx.any(x)]
    keys = mx.random.split(mx.random.key(0), len(zeros) + 1)
    noisy = [(p, 0.1 * mx.random.normal(x.shape, x.dtype, key=key)) for (p, x), key in zip(zeros, keys, strict=False)]
    try:
        model.load_weights(noisy, strict=False)
        yield
    finally:
        model.load_weights(zeros, strict=False)


def _refuse_unknown(extra: Sequence[str], bench: Bench) -> None:
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
