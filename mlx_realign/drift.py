# SPDX-License-Identifier: Apache-2.0
"""How far the policy has moved from where it began, and what is done about it.

`Probe` measures the KL to the start, `Limit` acts where it is too large, `Displacement` notices that chosen completions
lose probability along with rejected ones. `Drift` is the three of them in a run; what they remember goes into its
checkpoints.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import data
from .batch import Batch, Completion, Example
from .config import TrainSettings
from .distributions import divergence, log_probs
from .policy import Policy
from .sums import number_of

POSITIONS, ROWS = 64, 8  # of a probe, at most
LEAST_EVERY = 10  # steps between measurements, unless --kl-every asks for fewer
WINDOW = 20  # steps whose means are judged
STANDARD_ERRORS = 4.0  # asked at every step: with two, chance alone would warn of one run in three of 1000 steps
LEAST_FALL = 1e-3  # nats, or rewards: less is rounding
REMEDIES = (
    "What helps: --loss-type sigmoid,sft --loss-weights 1,0.2, or --loss-type dpop, nca_pair or apo_zero (all of dpo); "
    "a larger --beta; a lower --learning-rate"
)


class Drift:
    """What a run knows of its policy's way from the start."""

    def __init__(
        self,
        policy: Policy,
        settings: TrainSettings,
        rows: Sequence[Example] | data.Dataset,
        steps: int,
        *,
        relative: bool,
    ) -> None:
        """rows: the probe's, held-out ones where there are any; relative: rewards are relative to the start."""
        self.steps = steps
        self.every = max(LEAST_EVERY, steps // 20) if settings.kl_every is None else settings.kl_every
        self.probe = Probe(policy, rows, seed=settings.seed, batch_size=settings.batch_size) if self.every else None
        self.limit = Limit(settings.kl_max, settings.kl_action)
        self.displacement = Displacement(relative)

    @property
    def described(self) -> str:
        """What is measured when, for people."""
        if not self.probe:
            return "not measured"
        return f"at {self.probe.positions} tokens of {len(self.probe.examples)} rows, every {self.every} steps"

    def begin(self) -> None:
        """Remember the start. Called before the first step, and before a run that goes on gets its weights back."""
        if self.probe:
            self.probe.begin()

    def measure(self, step: int, evaluating: bool) -> dict[str, float]:
        """{"kl": nats per token} after the steps where it is due, else {}: what to roll back to is also evaluated."""
        due = self.probe and (step % self.every == 0 or step == self.steps)
        if self.probe and (due or evaluating and self.limit.action == "rollback"):
            return {"kl": self.probe.measure()}
        return {}

    def judge(self, row: dict[str, Any]) -> list[str]:
        """What a step's metrics call for is done; a sentence for each thing that the user should know."""
        step, kl = row["step"], row.get("kl")
        acted = None if kl is None else self.limit.judge(step, kl, last=step == self.steps)
        return [line for line in (acted, self.displacement.hear(row)) if line]

    @property
    def state(self) -> dict[str, Any]:
        """What a run that goes on must know; plain values."""
        limit, heard = self.limit, self.displacement
        words = {"first": heard.first, "last": heard.last, "told": heard.told}
        return {"halvings": limit.halvings, "stopped": limit.stopped, "safe": limit.safe} | words

    def restore(self, state: dict[str, Any]) -> None:
        """Put `state` back."""
        for part in (self.limit, self.displacement):
            vars(part).update({name: value for name, value in state.items() if name in vars(part)})


# ------------------------------------------------------------------ measuring


class Probe:
    """Up to 64 trained positions in up to 8 rows, at which next-token distributions are compared with the start's.

    Exact at these positions: the whole vocabulary counts. It costs, at the start and at each measurement, a forward
    pass without gradient over at most 8 prompts with one completion each, in pieces of a micro-batch: about two fifths
    of a training step on 4 pairs of that length. And [64, V] float32 for as long as the run lasts, 39 MB with 152k
    tokens. A model that computes in bfloat16 is measured as it is, rounding included: there a KL below 1e-3 may be
    nothing else.
    """

    def __init__(self, policy: Policy, rows: Sequence[Example] | data.Dataset, *, seed: int, batch_size: int) -> None:
        self.policy = policy
        places = np.sort(np.random.default_rng(seed).permutation(len(rows))[:ROWS])
        self.examples = [thinned(rows[int(p)], i, POSITIONS // len(places)) for i, p in enumerate(places)]
        starts = range(0, len(self.examples), batch_size)
        self.batches = [data.collate(self.examples[i : i + batch_size]) for i in starts]
        self.positions = sum(batch.positions.size for batch in self.batches)
        self.start: list[mx.array] = []

    def begin(self) -> None:
        """What the policy says now is the start."""
        self.start = [self.log_probs(batch) for batch in self.batches]

    def measure(self) -> float:
        """KL(policy now || policy at the start), nats per token: the mean over the positions."""
        pairs = zip(self.batches, self.start, strict=True)
        return sum(number_of(divergence(self.log_probs(batch), start).sum()) for batch, start in pairs) / self.positions

    def log_probs(self, batch: Batch) -> mx.array:
        """float32 [n, V] at the n trained positions of a batch, row after row, evaluated."""
        policy = self.policy

        def build(part: Batch) -> mx.array:
            hidden = policy.states(part).completion
            return log_probs(policy.body.logits(hidden.reshape(-1, hidden.shape[-1])[part.positions]))

        mx.eval(policy.model.state)  # workers could not evaluate what is pending in this thread
        return mx.concatenate(policy.workers.map(batch, build))


def thinned(example: Example, which: int, most: int) -> Example:
    """One completion of a row, where at most `most` of the trained tokens, evenly apart, are still marked as trained.

    which: counts rows, so that chosen and rejected ones take turns. What follows the last mark is cut off.
    """
    usable = [completion for completion in example.completions if completion.mask.any()]
    tokens, mask = usable[which % len(usable)]
    trained = np.flatnonzero(mask)
    kept = trained[np.unique(np.linspace(0, len(trained) - 1, most).round().astype(int))]
    marks = np.zeros(kept[-1] + 1, bool)
    marks[kept] = True
    return Example(example.prompt, (Completion(tokens[: len(marks)], marks),), example.line, example.key, {})


# ------------------------------------------------------------------ acting


class Limit:
    """--kl-max and --kl-action: what is done about a measurement."""

    def __init__(self, most: float | None, action: str) -> None:
        self.most, self.action = most, action
        self.halvings = 0  # of the learning rate
        self.stopped = False
        self.safe: Sequence[Any] | None = None  # step and eval_loss (or None) of the checkpoint to roll back to

    @property
    def factor(self) -> float:
        """Of the learning rate."""
        return 0.5**self.halvings

    @property
    def safe_step(self) -> int | None:
        """The step whose checkpoint must be there to roll back to."""
        return self.safe[0] if self.safe else None

    @property
    def back_to(self) -> int | None:
        """The step whose checkpoint is the result, where the run was rolled back."""
        return self.safe_step if self.stopped else None

    def judge(self, step: int, kl: float, *, last: bool) -> str | None:
        """Act on a measurement; the sentence that says so. A KL that is no number is too large."""
        if self.most is None or kl <= self.most:
            return None
        above = f"step {step}: the KL to the start is {kl:.3g} nats per token, above --kl-max {self.most:g}"
        if self.action == "lower":
            if last:
                return f"{above}, and no step is left to bring it back: lower --learning-rate, or --kl-action rollback"
            self.halvings += 1
            return f"{above}: the learning rate is halved from here on, to {self.factor:.4g} of the schedule's"
        self.stopped = True
        if self.action == "stop" or not self.safe:
            return f"{above}: the run stops here"
        back, loss = self.safe
        told = "" if loss is None else f", the best evaluation within it (loss {loss:.4f})"
        advice = "" if back else ", where it began: lower --learning-rate, or measure more often (--kl-every)"
        return f"{above}: the run stops and its result is the policy after step {back}{told}{advice}"

    def keep(self, step: int, kl: float | None, eval_loss: float | None = None) -> bool:
        """Whether to roll back to this state from now on: the best evaluation within the limit, before one the newest.

        A caller that is told True saves the state.
        """
        if self.action != "rollback" or self.most is None or kl is None or not kl <= self.most:
            return False
        best = self.safe[1] if self.safe else None
        if best is not None and (eval_loss is None or eval_loss >= best):
            return False
        self.safe = (step, eval_loss)
        return True


# ------------------------------------------------------------------ listening


class Displacement:
    """Notices likelihood displacement (arXiv:2410.08847): chosen falls together with rejected.

    With rewards relative to the start, the means of the last 20 steps are held against 0; else the means of log-probs
    against those of the first 20 steps. Both must have fallen by more than four standard errors. Said once.
    """

    def __init__(self, relative: bool) -> None:
        self.relative = relative
        self.first: list[list[float]] = []  # [chosen, rejected] of the first steps, where they are the measure
        self.last: list[list[float]] = []  # and of the last ones
        self.told = False

    def hear(self, row: dict[str, Any]) -> str | None:
        """The metrics of one optimizer step; a sentence when there is something to say."""
        kind = "rewards" if self.relative else "logps"
        names = [f"{kind}/{side}" for side in ("chosen", "rejected")]
        values = [row.get(name, math.nan) for name in names]
        if not all(map(math.isfinite, values)):
            return None
        if not self.relative and len(self.first) < WINDOW:
            self.first = [*self.first, values]
            return None
        self.last = [*self.last[1 - WINDOW :], values]
        if self.told or len(self.last) < WINDOW:
            return None
        changes = [self.change(side) for side in (0, 1)]
        if any(change >= -max(STANDARD_ERRORS * error, LEAST_FALL) for change, error in changes):
            return None
        self.told = True
        fell = " and ".join(f"{name} by {-change:.3g}" for name, (change, _) in zip(names, changes, strict=True))
        return (
            f"step {row['step']}: chosen completions lose probability together with rejected ones (likelihood "
            f"displacement): since the start, {fell} in the mean of {WINDOW} steps. {REMEDIES}"
        )

    def change(self, side: int) -> tuple[float, float]:
        """Of the mean of chosen (0) or rejected (1) since the start, and its standard error."""
        now, before = ([values[side] for values in window] for window in (self.last, self.first))
        mean = statistics.fmean(now) - (statistics.fmean(before) if before else 0.0)
        spread = [statistics.variance(values) / len(values) for values in (now, before) if values]
        return mean, math.sqrt(sum(spread))
