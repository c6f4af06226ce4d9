# SPDX-License-Identifier: Apache-2.0
"""How the rows of a step lie on a GPU: few shapes, so that few traces are compiled, and no padding before a prompt.

A compiled step is traced once for each set of shapes, and a trace is never given back, so the shapes are chosen before
the run from the lengths in its data: at most CAP, the rarest rows aside, which run without a trace. Rows with one
completion each stay together as they are batched. A row with several completions is computed by itself: so many tokens
of its prompt are shared as its shape says, the rest stands before each completion; shorter and longer completions have
widths of their own. Which rows make a step is not decided here, and a loss is a sum over rows: only its parts change.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import data
from .batch import Batch, Completion, Example, Strip
from .policy import Policy

LIGHT = (64, 72, 80, 96, 128, 192, 256, 512)  # head sizes of MLX's kernels for attention's backward pass on a Mac
CAP = 32  # shapes; bounded to so many signatures a peer's steps on a Mac became a quarter faster
RARE = 0.045  # of the calls at most that go without a trace, the largest ones
SAMPLE = 4096  # rows or batches whose lengths are looked at
ITEMS = 800  # lengths are rounded to a coarser grid until so many are left to choose from
STEP = 8  # tokens; lengths of shapes are multiples of it
REPEATED = 4.0  # what a prompt token that is computed once more counts, in tokens of padding


class Shape(NamedTuple):
    """Of a part of a step: of each prompt `prefix` tokens are shared, completions lie in strips of `widths`."""

    examples: int
    rows: int  # completions
    prefix: int
    widths: tuple[int, ...]
    positions: int  # hidden states that go to the head

    @property
    def tokens(self) -> int:
        """Computed by a forward pass."""
        return self.examples * self.prefix + sum(n * width for n, width in zip(_strips(self), self.widths, strict=True))

    @property
    def cost(self) -> float:
        """By which shapes that hold the same rows are compared."""
        return self.tokens - (REPEATED - 1) * (self.rows - self.examples) * self.prefix


class Need(NamedTuple):
    """What a part of a step needs at least. lengths: fed tokens of the longest text in each strip, prompt included."""

    examples: int
    rows: int
    prefix: int  # at most
    lengths: tuple[int, ...]
    trained: int
    real: int  # tokens without padding, each prompt once


def _strips(of: Shape | Need) -> tuple[int, ...]:
    """How many rows each strip has."""
    parts = of.widths if isinstance(of, Shape) else of.lengths
    return (of.rows,) if len(parts) == 1 else (of.rows // 2, of.rows - of.rows // 2)


def need(examples: Sequence[Example], *, sharing: bool = True) -> Need:
    """Of rows that are computed together."""
    lengths = sorted(len(e.prompt) - 1 + len(c.tokens) for e in examples for c in e.completions)
    trained = sum(int(c.mask.sum()) for e in examples for c in e.completions)
    several = len(lengths) > len(examples)
    prefix = min(len(e.prompt) for e in examples) - 1 if several and sharing else 0
    ends = (lengths[len(lengths) // 2 - 1], lengths[-1]) if several else (lengths[-1],)
    real = sum(len(e.prompt) - 1 + sum(len(c.tokens) for c in e.completions) for e in examples)
    return Need(len(examples), len(lengths), prefix, ends, trained, real)


class Layout:
    """The shapes of a run, and what has been laid out in them."""

    def __init__(self, shapes: Iterable[Shape], *, whole: bool = False, sharing: bool = True) -> None:
        """whole: rows of a batch stay together, for losses that compare all of them. sharing: of prompts."""
        self.whole, self.sharing = whole, sharing
        self.shapes = tuple(sorted(set(shapes), key=lambda shape: shape.cost))
        self.counted: Counter[str] = Counter()
        self.used: Counter[Shape] = Counter()

    def parts(self, examples: Sequence[Example]) -> list[list[Example]]:
        """A batch of rows, cut into what is computed together."""
        if self.whole or all(len(e.completions) == 1 for e in examples):
            return [list(examples)]
        return [[example] for example in examples]

    def need(self, examples: Sequence[Example]) -> Need:
        """Of rows that are computed together."""
        return need(examples, sharing=self.sharing)

    def find(self, wanted: Need) -> Shape | None:
        """The cheapest shape of the run that holds a part; None: it gets one of its own."""
        return next((shape for shape in self.shapes if _holds(shape, wanted)), None)

    def lay(self, examples: Sequence[Example]) -> Batch:
        """The batch of a part."""
        shape, planned = self.note(self.need(examples))
        return data.collate_exact(examples, shape.prefix, shape.widths, positions=shape.positions, planned=planned)

    def note(self, wanted: Need) -> tuple[Shape, bool]:
        """The shape that a part is laid out in, and whether it is one of the run; counted."""
        found = self.find(wanted)
        shape = found or _exactly(wanted)
        self.used[shape] += 1
        repeated = (wanted.rows - wanted.examples) * (wanted.prefix - shape.prefix)
        counts = {"computed": shape.tokens, "real": wanted.real, "repeated": max(repeated, 0)}
        self.counted.update(calls=1, planned=found is not None, **counts)
        return shape, found is not None

    def shares(self) -> dict[str, float]:
        """What has been laid out so far.

        shapes; compiled_share of the calls; padding_share of the computed tokens; recomputed_share: prompt tokens that
        were computed more than once, relative to real tokens.
        """
        found = self.counted
        if not found["calls"]:
            return {"shapes": len(self.shapes)}
        padding = found["computed"] - found["real"] - found["repeated"]
        return {
            "shapes": len(self.shapes),
            "compiled_share": found["planned"] / found["calls"],
            "padding_share": padding / found["computed"],
            "recomputed_share": found["repeated"] / found["real"],
        }


def blank(shape: Shape) -> Batch:
    """A batch of a shape with nothing in it."""
    each = shape.rows // shape.examples
    tokens = np.zeros(shape.widths[-1], np.int32)
    one = Completion(tokens, np.ones(len(tokens), bool))
    row = Example(np.zeros(shape.prefix + 1, np.int32), (one,) * each, 0, "", {})
    batch = data.collate_exact([row] * shape.examples, shape.prefix, positions=shape.positions)
    rows = np.split(np.arange(shape.rows, dtype=np.int32), np.cumsum(_strips(shape))[:-1])
    strips = [Strip(mx.array(r), mx.zeros((len(r), n), mx.int32)) for r, n in zip(rows, shape.widths, strict=True)]
    return batch._replace(strips=tuple(strips) if len(strips) > 1 else ())


def _holds(shape: Shape, wanted: Need) -> bool:
    same = (shape.examples, shape.rows, len(shape.widths)) == (wanted.examples, wanted.rows, len(wanted.lengths))
    fits = all(shape.prefix + width >= n for width, n in zip(shape.widths, wanted.lengths, strict=False))
    return same and fits and shape.prefix <= wanted.prefix and shape.positions >= wanted.trained


def _exactly(wanted: Need) -> Shape:
    widths = tuple(max(n - wanted.prefix, 2) for n in wanted.lengths)  # of one column a recurrence asks for a kernel
    return Shape(wanted.examples, wanted.rows, wanted.prefix, widths, max(wanted.trained, 1))


def attention(met: Counter[tuple[int, str]]) -> dict[str, float]:
    """Of attention calls by head size and kind of mask (`kernels.Switch.attended`).

    mask_free_share: those that need no array. light_share: by head size, those that MLX has a backward pass for on a
    Mac which keeps no quadratic array. banded_share: those with a window, in memory of row times window.
    """
    calls = sum(met.values())
    if not calls:
        return {}
    free, banded = (sum(n for (_, kind), n in met.items() if kind in kinds) for kinds in (("free", "sinks"), ("band",)))
    light = {size: n / calls for (size, kind), n in sorted(met.items()) if kind == "free" and size in LIGHT}
    told = {"mask_free_share": free / calls} | ({"banded_share": banded / calls} if banded else {})
    return told | {f"light_share/{size}": share for size, share in light.items()}


# ------------------------------------------------------------------ choosing


def of_rows(rows: data.Dataset, batches: Callable[[int], Sequence[np.ndarray]], epochs: int, **options: Any) -> Layout:
    """For rows with completions. batches: the rows of each micro-batch of an epoch."""
    needs: list[Need] = []
    bare = Layout((), **options)
    for epoch in range(min(epochs, 4)):
        for places in spread(batches(epoch), SAMPLE // min(epochs, 4)):
            needs += [bare.need(part) for part in bare.parts([rows[int(i)] for i in places]) if part[0].completions]
    return Layout(choose(needs), **options)


def of_rollouts(prompt_lengths: np.ndarray, group: int, most: int, **options: Any) -> Layout:
    """For groups that are generated: prompts as they are, completions of up to a quarter, a half and all of `most`."""
    ends = sorted({_up(max(1, most * k // 4), STEP) for k in (1, 2, 4)})
    pairs = [(a, b) for b in ends for a in ends if a <= b] if group > 1 else [(b,) for b in ends]
    lengths = np.sort(prompt_lengths)[np.linspace(0, len(prompt_lengths) - 1, SAMPLE).astype(int)]
    sharing = options.get("sharing", True) and group > 1
    prompts = [Need(1, 1, int(n) - 1 if sharing else 0, (int(n),), 1, int(n)) for n in lengths]
    kinds = choose(prompts, cap=max(1, CAP // len(pairs)))
    shapes = []
    for prefix, longest in {(shape.prefix, shape.prefix + shape.widths[-1]) for shape in kinds}:
        for pair in pairs:
            widths = tuple(longest - 1 - prefix + n for n in pair)
            count = Shape(1, group, prefix, widths, 0)
            full = sum(n * width for n, width in zip(_strips(count), widths, strict=True))
            shapes.append(count._replace(positions=full))
    return Layout(shapes, **options)


def options(policy: Policy) -> dict[str, bool]:
    """What of a policy a layout depends on."""
    whole = "whole_batch" in policy.needs or policy.balance is not None
    return {"whole": whole, "sharing": policy.sharing}


def spread(found: Sequence[np.ndarray], most: int = SAMPLE) -> list[np.ndarray]:
    """Some of the batches, evenly apart, where there are more than that."""
    return [found[int(i)] for i in np.unique(np.linspace(0, len(found) - 1, min(len(found), most)).astype(int))]


def choose(needs: Sequence[Need], cap: int = CAP) -> list[Shape]:
    """At most `cap` shapes that hold all needs but for a few of the largest, with little padding and repetition.

    Begins with a shape for each, rounded where these are too many, and makes one of the two whose merging adds least,
    until few are left.
    """
    if not needs:
        return []
    kinds = sorted({(n.examples, n.rows, len(n.lengths)) for n in needs})
    of = [kinds.index((n.examples, n.rows, len(n.lengths))) for n in needs]
    table = np.array(
        [[kind, n.prefix, n.lengths[0], n.lengths[-1], n.trained] for kind, n in zip(of, needs, strict=True)]
    )
    rounded, step = table, 0
    while len(items := np.unique(rounded[:, :4], axis=0)) > (ITEMS if step else cap):
        step += STEP
        rounded = _rounded(table, step)
    items, which, counts = np.unique(rounded[:, :4], axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    trained = np.zeros(len(items), int)
    np.maximum.at(trained, which, table[:, 4])
    if len(items) > cap:
        size = _tokens(items, kinds)
        order = np.argsort(-size)
        rare = order[np.cumsum(counts[order]) <= RARE * len(needs)]
        kept = np.setdiff1d(np.arange(len(items)), rare)
        items, counts, trained = _merged(items[kept], counts[kept], trained[kept], kinds, cap)
    return [_shape(item, int(n), kinds) for item, n in zip(items, trained, strict=True)]


def _rounded(table: np.ndarray, step: int) -> np.ndarray:
    """Prefixes down and what comes behind them up to a grid that is coarser for longer texts."""
    found = table.copy()
    grid = np.maximum(step, 2 ** np.maximum(np.log2(np.maximum(table[:, 1], 1)).astype(int) - 5, 0))
    found[:, 1] = table[:, 1] // grid * grid
    for column in (2, 3):
        rest = table[:, column] - found[:, 1]
        grid = np.maximum(step, 2 ** np.maximum(np.log2(np.maximum(rest, 1)).astype(int) - 4, 0))
        found[:, column] = found[:, 1] + _up(rest, grid)
    return found


def _up(n: Any, step: Any) -> Any:
    return -(-n // step) * step


def _tokens(items: np.ndarray, kinds: list[tuple[int, int, int]], repeated: float = 0.0) -> np.ndarray:
    """Computed tokens of items [..., 4] (kind, prefix, lengths in two strips), less `repeated` times what is shared."""
    of = np.array(kinds)[items[..., 0]]
    examples, rows, strips = of[..., 0], of[..., 1], of[..., 2]
    short = np.where(strips > 1, rows // 2, 0)
    prefix, first, last = items[..., 1], items[..., 2], items[..., 3]
    found = examples * prefix + short * (first - prefix) + (rows - short) * (last - prefix)
    return found - repeated * (rows - examples) * prefix


def _merged(
    items: np.ndarray, counts: np.ndarray, trained: np.ndarray, kinds: list[tuple[int, int, int]], cap: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    items, counts, trained = items.copy(), counts.copy(), trained.copy()
    weight = REPEATED - 1
    cost = _tokens(items, kinds, weight)

    def added(i: int) -> np.ndarray:
        both = _both(items[i], items)
        more = _tokens(both, kinds, weight) * (counts[i] + counts) - cost[i] * counts[i] - cost * counts
        return np.where((items[:, 0] != items[i, 0]) | ~alive | (np.arange(len(items)) == i), np.inf, more)

    alive = np.ones(len(items), bool)
    gaps = np.stack([added(i) for i in range(len(items))])
    while alive.sum() > cap:
        i, j = np.unravel_index(np.argmin(gaps), gaps.shape)
        if not np.isfinite(gaps[i, j]):
            break
        items[i], counts[i] = _both(items[i], items[j]), counts[i] + counts[j]
        trained[i] = max(trained[i], trained[j])
        cost[i] = _tokens(items[i], kinds, weight)
        alive[j] = False
        gaps[j] = gaps[:, j] = np.inf
        gaps[i] = gaps[:, i] = added(int(i))
    if alive.sum() > cap:  # more kinds than shapes: the most frequent ones
        alive[np.flatnonzero(alive)[np.argsort(-counts[alive])[cap:]]] = False
    return items[alive], counts[alive], trained[alive]


def _both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What holds both: the shorter prefix, the longer texts."""
    low = np.minimum(a, b)
    found = np.maximum(a, b)
    found[..., 1] = low[..., 1]
    return found


def _shape(item: np.ndarray, trained: int, kinds: list[tuple[int, int, int]]) -> Shape:
    kind, prefix, first, last = map(int, item)
    examples, rows, strips = kinds[kind]
    widths = tuple(max(n - prefix, 2) for n in ((first, last) if strips > 1 else (last,)))
    bare = Shape(examples, rows, prefix, widths, 0)
    full = sum(n * width for n, width in zip(_strips(bare), widths, strict=True))
    return bare._replace(positions=min(full, _up(max(trained, 1), STEP)))
