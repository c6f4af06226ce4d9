# SPDX-License-Identifier: Apache-2.0
"""What an ablation did, on prompts that the direction is not from: the same prompts before and after.

The behaviour is counted by its markers in greedy completions of at least 100 tokens: shorter ones flatter (a refusal
may come late). Completions that are empty or go round in circles are no success and count as the behaviour. What the
edit costs is the KL to the base on the negatives, first token and along the base's own completions, and perplexity.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import capture, data, distributions, rollout
from ..errors import UserError
from ..intervals import Interval, paired, sign_test, wilson
from ..policy import Policy
from ..sampling import Sampling
from .edit import Applied
from .scorers import MARKERS, broken, plain, read_text
from .trial import Forced, Slots

LEAST_TOKENS = 100  # of completions, below which a rate of markers says little
PIECE = 1 << 25  # entries of log-probs made at a time
WINDOW = 1024  # tokens of a text that the model is given at once
DAMAGE = 0.5  # nats of first-token KL: above it, published models are damaged

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """What is measured by."""

    positive: list[list[int]]  # token ids of held-out prompts
    negative: list[list[int]]
    shown: list[str]  # the positives as people read them, then the negatives
    markers: Sequence[str] = MARKERS  # texts by which the behaviour shows
    max_new_tokens: int = LEAST_TOKENS
    batch_size: int = 64
    kl_tokens: int = 32  # of the base's completion, along which the KL is measured
    text: str | None = None  # a file for the perplexity; None: the base's completions of the negatives
    samples: int = 8  # of each set, shown side by side
    max_kl: float | None = None  # nats that the first token was to stay within


class Side(NamedTuple):
    """Completions of one set of prompts."""

    texts: list[str]
    tokens: list[list[int]]
    shows: np.ndarray  # bool [n], a marker is in it
    broken: np.ndarray  # bool [n], empty or degenerate

    @property
    def failed(self) -> np.ndarray:
        """bool [n]: the behaviour, or nothing that could be called an answer."""
        return self.shows | self.broken


@dataclass
class Measured:
    """Before and after."""

    before: tuple[Side, Side]  # positives, negatives
    after: tuple[Side, Side]
    kl_first: float  # mean over negatives, nats
    kl_tokens: np.ndarray  # float64, nats at every token along the base's completions
    perplexity: tuple[float, float]
    along: dict[str, float]  # where the sets stand on the direction: see `along`
    leaks: dict[str, float]  # path -> share of r left in what the writer gives
    blocks: dict[int, float]  # block -> share of r in what the block adds
    notes: list[str] = field(default_factory=list)


def complete(policy: Policy, prompts: Sequence[Sequence[int]], bench: Bench) -> Side:
    """Greedy completions and what they show."""
    sampling = Sampling(max_new_tokens=bench.max_new_tokens, temperature=0.0)
    made = rollout.rollout(policy, [list(prompt) for prompt in prompts], sampling, rows=bench.batch_size)
    texts = [one.text for [one] in made]
    marks = [plain(marker) for marker in bench.markers]
    shows = np.array([any(mark in plain(text) for mark in marks) for text in texts], bool)
    tokens = [one.tokens.tolist() for [one] in made]
    return Side(texts, tokens, shows, np.array([broken(text) for text in texts], bool))


class Removed(NamedTuple):
    """Where the direction is from."""

    direction: np.ndarray  # float64 [d]
    block: int
    position: int | str  # from the end of the prompt and `prefix`, or over completions
    prefix: Sequence[int] = ()


def along(policy: Policy, bench: Bench, removed: Removed, said: Sequence[Side]) -> list[float]:
    """Mean projection of both sets on the direction, where it is from, in units of the stream.

    said: completions of both, whose states are taken where the direction is from completions.
    """
    unit, blocks, means = removed.direction / np.linalg.norm(removed.direction), (removed.block,), []
    for prompts, side in zip((bench.positive, bench.negative), said, strict=True):
        if isinstance(removed.position, str):
            states = capture.completion_means(policy, prompts, side.tokens, blocks=blocks)[:, 0]
        else:
            texts = [[*prompt, *removed.prefix] for prompt in prompts]
            states = capture.collect(policy, texts, positions=(removed.position,), blocks=blocks)[:, 0, 0]
        means.append(float((states.astype(np.float64) @ unit).mean()))
    return means


def states(policy: Policy, texts: Sequence[Forced]) -> mx.array:
    """Final hidden states [wanted columns of all texts, D], evaluated."""
    with Slots(policy, [], 0, 1) as slots:
        found = slots.states(0, texts)
        mx.eval(found)
        return found


def log_probs(policy: Policy, hidden: mx.array) -> Iterator[mx.array]:
    """float32 [some, V] of hidden states [n, D], in pieces that fit in memory."""
    size = max(1, PIECE // policy.vocabulary)
    for start in range(0, hidden.shape[0], size):
        yield distributions.log_probs(policy.body.logits(hidden[start : start + size]))


def divergences(policy: Policy, base: mx.array, now: mx.array) -> np.ndarray:
    """KL(base || now) in nats, float64 [n], of final hidden states [n, D]; the head is no writer, so it is the same."""
    pairs = zip(log_probs(policy, base), log_probs(policy, now), strict=True)
    return np.concatenate([np.array(distributions.divergence(p, q)).astype(np.float64) for p, q in pairs])


def perplexity(policy: Policy, hidden: mx.array, targets: np.ndarray) -> float:
    """exp of the mean negative log-prob of targets int [n], from final hidden states [n, D]."""
    total, at = 0.0, 0
    for logps in log_probs(policy, hidden):
        wanted = mx.array(targets[at : at + len(logps)].astype(np.int32))[:, None]
        total -= float(np.array(mx.take_along_axis(logps, wanted, 1).sum()))
        at += len(logps)
    return math.exp(min(total / max(at, 1), 700.0))


def measure(
    applied: Applied,
    bench: Bench,
    removed: Removed,
    found: tuple[dict[str, float], dict[int, float]],
    *,
    before: tuple[Side, Side] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Everything, before and after the edits of `applied`.

    found: leaks and shares in blocks, measured already; before: completions of the policy without the edits, too.
    """
    policy = applied.policy
    if before is None:
        with applied.off():
            say("completions before the edit")
            before = complete(policy, bench.positive, bench), complete(policy, bench.negative, bench)
    say("completions after the edit")
    after = complete(policy, bench.positive, bench), complete(policy, bench.negative, bench)
    say("KL and perplexity")
    said = [ids[: bench.kl_tokens] for ids in before[1].tokens]
    both = list(zip(bench.negative, said, strict=True))
    forced = [Forced([*prompt, *ids[:-1]], len(prompt) - 1) for prompt, ids in both]
    texts, targets = (
        texts_of(policy, bench.text) if bench.text else (forced, np.concatenate([np.array(i) for i in said]))
    )
    now = states(policy, forced), states(policy, texts) if bench.text else None
    where = along(policy, bench, removed, before)
    with applied.off():
        old = states(policy, forced), states(policy, texts) if bench.text else None
        was = along(policy, bench, removed, before)
    kls = divergences(policy, old[0], now[0])
    firsts = np.cumsum([0, *(len(ids) for ids in said[:-1])])
    exact = tuple(perplexity(policy, side[0] if side[1] is None else side[1], targets) for side in (old, now))
    positions = _positions(was, where)
    result = Measured(before, after, float(kls[firsts].mean()), kls, exact, positions, *found)  # type: ignore[arg-type]
    result.notes = remarks(result, bench)
    return result


def _positions(was: list[float], now: list[float]) -> dict[str, float]:
    """Means on the direction, with the negatives at 0 and the positives at 1 before the edit."""
    scale = (was[0] - was[1]) or 1.0
    return {
        f"{name}_after": (mean - was[1]) / scale for name, mean in zip(("positives", "negatives"), now, strict=True)
    }


def texts_of(policy: Policy, file: str) -> tuple[list[Forced], np.ndarray]:
    """Paragraphs of a text file as the model reads them, raw, and their tokens from the second on, int [n].

    UserError for a file that cannot be read or holds nothing to predict.
    """
    told = [part.strip() for part in read_text(file, "--text").split("\n\n") if part.strip()]
    tokens = [data.encode_prompt(part, policy.tokenizer, chat_template=False) for part in told]
    parts = [ids[i : i + WINDOW] for ids in tokens for i in range(0, len(ids), WINDOW)]
    policy.reach.refuse(parts, policy.tokenizer, f"--text {file}: part")
    texts = [text for ids in tokens for text in _windows(ids, policy.tokenizer.bos_token_id)]
    if not texts:
        raise UserError(f"--text {file}: holds no text to predict.")
    return texts, np.concatenate([np.array(ids[1:], np.int32) for ids in tokens])


def _windows(ids: Sequence[int], bos: int | None) -> list[Forced]:
    """A text in parts of at most WINDOW tokens, so that each token but the first is predicted once, in order.

    A text that begins with `bos` has it before each part.
    """
    given, begin = list(ids[:-1]), list(ids[:1]) if ids and ids[0] == bos else []
    size = WINDOW - len(begin)
    first = [Forced(given[:WINDOW], 0)] if given else []
    return first + [Forced([*begin, *given[i : i + size]], len(begin)) for i in range(WINDOW, len(given), size)]


# ------------------------------------------------------------------ what follows


def rate(hits: np.ndarray) -> dict[str, float | int]:
    """Share, its Wilson interval, count."""
    value, low, high = wilson(int(hits.sum()), len(hits))
    return {"value": value, "low": low, "high": high, "count": len(hits)}


def change(before: np.ndarray, after: np.ndarray) -> dict[str, float | int]:
    """after - before of the same prompts, its interval, how many rose and fell, and the sign test's p."""
    found: Interval = paired(before.astype(float), after.astype(float), np.ones(len(before)))
    higher, lower = int((after & ~before).sum()), int((before & ~after).sum())
    return {**found._asdict(), "higher": higher, "lower": lower, "p": sign_test(higher, lower)}


def remarks(found: Measured, bench: Bench) -> list[str]:
    """What the user should be warned of, one sentence each."""
    (old, _), (new, others) = found.before, found.after
    lines = []
    if old.failed.mean() < 0.5:
        lines.append(
            f"only {old.failed.mean():.0%} of the positives showed the behaviour before: check --markers and prompts"
        )
    if new.failed.mean() > old.failed.mean() / 2:
        lines.append(
            f"most of the behaviour is still there: {new.failed.mean():.0%} of the held-out positives, "
            f"{old.failed.mean():.0%} before. More or other prompts, --block auto, --rank 3 or --search may find more"
        )
    if bench.max_new_tokens < LEAST_TOKENS:
        lines.append(f"completions have at most {bench.max_new_tokens} tokens: a behaviour that comes later is missed")
    if new.broken.mean() > old.broken.mean() + 0.05 or others.broken.mean() > found.before[1].broken.mean() + 0.05:
        told = f"{new.broken.mean():.0%} of the positives' and {others.broken.mean():.0%} of the negatives' completions"
        lines.append(f"{told} are empty or degenerate: the edit is too strong")
    if (rise := others.shows.mean() - found.before[1].shows.mean()) > 0.05:
        lines.append(f"over-ablation: {rise:.0%} more of the negatives show the behaviour than before")
    if found.along["positives_after"] < -0.5:
        lines.append(
            f"over-ablation: the positives stand at {found.along['positives_after']:.1f} on the direction, beyond the "
            "negatives (0): lower --weight"
        )
    if bench.max_kl is not None and found.kl_first > bench.max_kl:
        lines.append(
            f"first-token KL {found.kl_first:.3g} on the held-out negatives is above the {bench.max_kl:g} of --max-kl"
        )
    if found.kl_first > DAMAGE:
        lines.append(f"first-token KL {found.kl_first:.2f} is above {DAMAGE}: at that, models are usually damaged")
    return lines


def facts(found: Measured) -> dict[str, Any]:
    """As JSON: rates with intervals, KL in nats, perplexity, shares."""
    sides: dict[str, Any] = {}
    for i, name in enumerate(("positive", "negative")):
        old, new = found.before[i], found.after[i]
        sides[name] = {
            "behaviour": {
                "before": rate(old.failed),
                "after": rate(new.failed),
                "change": change(old.failed, new.failed),
            },
            "marked": {"before": rate(old.shows), "after": rate(new.shows)},
            "broken": {"before": rate(old.broken), "after": rate(new.broken)},
        }
    kls = found.kl_tokens
    return {
        **sides,
        "kl": {
            "first_token": found.kl_first,
            "tokens_mean": float(kls.mean()),
            "tokens_p95": float(np.quantile(kls, 0.95)),
            "tokens_max": float(kls.max()),
            "count": len(kls),
        },
        "perplexity": dict(zip(("before", "after"), found.perplexity, strict=True)),
        "along_the_direction": found.along,
        "left_in_writers": found.leaks,
        "left_in_blocks": {str(block): share for block, share in found.blocks.items()},
        "notes": found.notes,
    }
