# SPDX-License-Identifier: Apache-2.0
"""Which kernel takes a behaviour away at the least cost: many are tried, no weight is touched.

    found = search.run(policy, direction, positive, negative, writers=writers.find(policy), trials=200,
                       journal=Path("search.jsonl"), pick="knee")
    edit.put_on(policy, found.edits)

Kernels come from `study`. Rows of several trials are decoded together; a trial whose failures so far already put it
behind another one is left (its scores are then bounds). Every trial is written to the journal as it ends: a search that
was stopped goes on where it was, in `trials` counted from the start, and one that is whole only picks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from .. import fingerprint, taps
from ..errors import UserError
from ..policy import Policy
from ..vectors import Direction
from ..ways import shares
from ..writers import Writer
from .edit import Edit
from .kernel import SPACE, Kernel, space_of
from .pareto import Trial, choose, coarse, dominates, front
from .scorers import Asked, Given, Markers, Prompt, Scorer, Setting, files, make
from .study import Study
from .trial import Job, Runner, Slots, completions

SLOTS = 8  # trials under way at most
WAITING = 3  # of them that wait for a more promising one
PROMISING = 0.1  # share of failures up to which a trial that is under way may well push others off the front
WORST = 1e3  # what is said of a score that is not finite
LEAST_SHOWN, FEW_SHOWN = 0.1, 0.5  # rates of markers in the unedited model: below, they do not fit; or may not
REPLY = 300  # characters of a reply that is shown


class Found(NamedTuple):
    """What a search found."""

    edits: list[Edit]  # of the chosen trial
    chosen: Trial
    front: list[Trial]
    trials: list[Trial]  # all, in the order of their numbers
    base: tuple[float, ...]  # scores of the unedited model
    scorers: list[Scorer]
    tokens: int  # generated in this call
    notes: list[str]


@dataclass
class Attempt:
    """A trial under way."""

    asked: Any  # Optuna's trial
    kernel: Kernel
    slot: int
    scores: list[float]  # bounds from below until it is whole
    verdicts: dict[int, dict[int, float]]  # of scorers that ask: by prompt
    generating: bool = False

    def bound(self, scorers: Sequence[Scorer]) -> tuple[float, ...]:
        """What its scores will be at least: whoever is still to be judged counts 0."""
        for i, own in self.verdicts.items():
            self.scores[i] = sum(own.values()) / len(scorers[i].prompts)  # type: ignore[union-attr]
        return tuple(self.scores)

    def guess(self, scorers: Sequence[Scorer]) -> tuple[float, ...]:
        """What a trial that is left would have come to, if the rest fail as often as all have until now."""
        return tuple(s + (1 - s) * s if i in self.verdicts else s for i, s in enumerate(self.bound(scorers)))

    def whole(self, scorers: Sequence[Scorer]) -> bool:
        """Whether every row is judged."""
        return all(len(own) == len(scorers[i].prompts) for i, own in self.verdicts.items())  # type: ignore[union-attr]


def run(
    policy: Policy,
    direction: Direction,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    writers: Sequence[Writer],
    journal: Path,
    scorers: Sequence[str] = ("markers", "kl"),
    trials: int = 200,
    startup: int | None = None,
    seed: int = 0,
    pick: str = "knee",
    max_kl: float | None = None,
    rows: int = 192,
    say: Callable[[str], None] = lambda _: None,
    **setting: Any,
) -> Found:
    """Try kernels until the journal holds `trials` whole or pruned ones, then pick.

    positive, negative: prompts to judge by, others than the direction is from. startup: kernels drawn before the
    sampler learns, the middle of all ranges and random ones, default 60 but at most 30% of `trials`. pick: see
    `pareto.choose`. max_kl: a trial whose KL is above it is left before anything is generated. rows: completions
    made at once. setting: the other fields of `scorers.Setting`.
    Raises UserError for a missing extra, a journal of another search, markers that the unedited model hardly shows, and
    what `scorers.make` and `kernel.space_of` refuse; KeyboardInterrupt says how to go on, the journal being whole.
    """
    made = make(scorers, Setting(policy, positive, negative, **setting))
    space = space_of(writers, direction, len(taps.blocks(policy.model)))
    study = Study(journal, made, space, startup if startup is not None else min(60, int(0.3 * trials)), seed, max_kl)
    asked = {
        "model": fingerprint.base(policy.model) + fingerprint.adapters(policy.model),
        "direction": _digest([vector.tobytes() for vector in direction.vectors.values()]),
        "prompts": _digest([json.dumps([list(positive), list(negative)], sort_keys=True).encode()]),
        "scorers": [scorer.name for scorer in made],
        "writers": _digest([writer.path.encode() for writer in writers]),
        "space": _digest([repr((SPACE, space)).encode()]),
        "setting": _digest([repr(sorted(setting.items())).encode()]),
        "max_kl": max_kl,
    }
    if read := [file for scorer in made for file in files(scorer)]:
        asked["content of the scorers' files"] = _digest([file.read_bytes() for file in read])
    with Slots(policy, writers, SLOTS, direction.width) as slots:
        search = _Search(slots, made, writers, direction, rows, say)
        study.claim(asked)
        try:
            base = search.run(study, trials)
        except KeyboardInterrupt as stop:
            kept = f"{len(study.trials())} of {trials} trials are kept in {journal}"
            stop.args = (f"stopped: {kept}; the same command goes on from there",)
            raise
        done = study.trials()
        if max_kl is not None and all(trial.pruned for trial in done):
            more = "Raise --max-kl, with a new --journal, or go on with more --trials."
            raise UserError(f"no trial stayed within a KL of {max_kl:g}. {more}")
        chosen = choose(pick, done, made)
        notes = [f"{sum(t.pruned for t in done)} of {len(done)} trials were left early", *_seldom(made, base)]
        edits = chosen.kernel.edits(writers, direction)
        return Found(edits, chosen, front(done, made), done, base, made, search.tokens, notes)


class _Search:
    """Evaluates what a study asks for."""

    def __init__(
        self,
        slots: Slots,
        scorers: list[Scorer],
        writers: Sequence[Writer],
        direction: Direction,
        rows: int,
        say: Callable[[str], None],
    ) -> None:
        self.slots, self.scorers, self.writers, self.direction = slots, scorers, writers, direction
        self.say = say
        self.ask = {i: scorer for i, scorer in enumerate(scorers) if isinstance(scorer, Asked)}
        self.give = {i: scorer for i, scorer in enumerate(scorers) if isinstance(scorer, Given)}
        prompts = [prompt for scorer in self.ask.values() for prompt in scorer.prompts]
        self.runner = Runner(slots, prompts, rows) if prompts and shares(slots.policy) else None
        self.counted = 0  # tokens generated without a runner
        self.trials = 0  # that the journal shall hold
        self.reply = ""  # one of the unedited model's that shows no marker
        for scorer in self.give.values():
            scorer.prepare(slots)

    @property
    def tokens(self) -> int:
        """Generated so far."""
        return self.counted + (self.runner.tokens if self.runner else 0)

    def run(self, study: Study, trials: int) -> tuple[float, ...]:
        """Until there are so many trials; scores of the unedited model, which is judged beside the first ones."""
        self.trials, done = trials, study.trials()
        best = [trial.scores for trial in front(done, self.scorers)]
        left, under_way = trials - len(done), []
        if study.base is None:
            self.say("the unedited model")
            under_way.append(self._attempt(None, Kernel({}), 0))
            self._settle(under_way, best, study)
        else:
            best.append(study.base)
        while left > 0 or under_way:
            while left > 0 and self._room(under_way):
                slot = min(set(range(1, SLOTS + 1)) - {attempt.slot for attempt in under_way})
                asked, kernel = study.ask([self._guessed(attempt) for attempt in under_way if attempt.asked])
                self.slots.set(slot, kernel.edits(self.writers, self.direction))
                under_way.append(self._attempt(asked, kernel, slot))
                left -= 1
                self._settle(under_way, best, study)
                self._start(under_way)
            if under_way:
                self._start(under_way)
                self._advance(under_way)
                self._settle(under_way, best, study)
        assert study.base is not None
        return study.base

    def _guessed(self, attempt: Attempt) -> Trial:
        return Trial(attempt.asked.number, attempt.kernel, attempt.guess(self.scorers))

    def _room(self, under_way: Sequence[Attempt]) -> bool:
        """Whether one more may begin."""
        if self.runner is None:
            return not under_way
        waiting = sum(not attempt.generating for attempt in under_way)
        return len(under_way) < SLOTS and waiting < WAITING and self.runner.hungry

    def _start(self, under_way: Sequence[Attempt]) -> None:
        """Rows of attempts that need not wait.

        One waits while another is no worse in all that is known of both, and hardly fails: when that is whole, this one
        most likely need not be judged at all.
        """

        def ahead(other: Attempt, own: Attempt) -> bool:
            if other.asked is None or not other.generating or not self.give:
                return False
            one, two = (coarse(attempt.bound(self.scorers), self.scorers) for attempt in (other, own))
            return all(one[i] <= PROMISING for i in self.ask) and all(one[i] <= two[i] for i in self.give)

        for attempt in under_way:
            if attempt.generating or any(ahead(other, attempt) for other in under_way):
                continue
            attempt.generating = True
            if self.runner is None:
                continue
            for i, scorer in self.ask.items():
                for place, prompt in enumerate(scorer.prompts):
                    self.runner.add(Job(_number(attempt.asked), i, place), attempt.slot, prompt)

    def _attempt(self, asked: Any, kernel: Kernel, slot: int) -> Attempt:
        """With the scores of given texts; what must be generated is yet to come."""
        attempt = Attempt(asked, kernel, slot, [0.0] * len(self.scorers), {i: {} for i in self.ask})
        for i, scorer in self.give.items():
            value = scorer.value(self.slots.logps(slot, scorer.texts))
            attempt.scores[i] = min(value, WORST)
        return attempt

    def _advance(self, under_way: Sequence[Attempt]) -> None:
        """One token for every row, or (where rows cannot differ) one trial's completions."""
        if self.runner is None:
            for i, scorer in self.ask.items():
                ids = completions(self.slots, under_way[0].slot, scorer.prompts, scorer.max_new_tokens)
                self.counted += sum(map(len, ids))
                texts = [self.slots.policy.tokenizer.decode(one) for one in ids]
                scores = scorer.judge(range(len(texts)), texts)
                under_way[0].verdicts[i] = dict(enumerate(scores))
                self._keep_reply(under_way[0], scorer, texts, scores)
            return
        by_number = {_number(attempt.asked): attempt for attempt in under_way}
        ended: dict[int, list[tuple[Job, str]]] = {i: [] for i in self.ask}
        for row, text, stopped in self.runner.step():
            job, scorer = row.tag, self.ask[row.tag.scorer]
            if stopped or len(row.tokens) >= scorer.max_new_tokens:
                row.done = True
                ended[job.scorer].append((job, text))
            elif scorer.decided(text):
                row.done = True
                by_number[job.trial].verdicts[job.scorer][job.prompt] = 1.0
        for i, some in ended.items():
            scores = self.ask[i].judge([job.prompt for job, _ in some], [text for _, text in some]) if some else []
            for (job, text), score in zip(some, scores, strict=True):
                by_number[job.trial].verdicts[i][job.prompt] = score
                self._keep_reply(by_number[job.trial], self.ask[i], [text], [score])

    def _settle(self, under_way: list[Attempt], best: list[tuple[float, ...]], study: Study) -> None:
        """Tell the study of trials that are whole, and of those that cannot reach the front any more."""
        for attempt in list(under_way):
            bound, whole = attempt.bound(self.scorers), attempt.whole(self.scorers)
            if attempt.asked is None:  # the unedited model: it is never left early
                if whole:
                    self._refuse_misfit(bound, study)
                    under_way.remove(attempt)
                    best.append(bound)
                    study.base = bound
                    self.say(f"the unedited model: {self._told(bound)}")
                continue
            too_far = study.too_far(bound) < 1
            behind = any(dominates(coarse(b, self.scorers), coarse(bound, self.scorers)) for b in best)
            if not (whole or behind or too_far):
                continue
            if self.runner is not None:
                self.runner.drop(_number(attempt.asked))
            under_way.remove(attempt)
            guess = bound if whole else attempt.guess(self.scorers)
            if too_far:
                guess = tuple(1.0 if i in self.ask else value for i, value in enumerate(guess))
            study.tell(attempt.asked, attempt.kernel, bound, coarse(guess, self.scorers), not whole)
            if whole:
                best.append(bound)
            told = f"{'' if whole else 'left at '}{self._told(bound)}"
            self.say(f"trial {attempt.asked.number} ({len(study.trials())}/{self.trials}): {told}")

    def _keep_reply(self, attempt: Attempt, scorer: Asked, texts: Sequence[str], scores: Sequence[float]) -> None:
        if attempt.asked is None and isinstance(scorer, Markers):
            self.reply = next((text for text, score in zip(texts, scores, strict=True) if not score), self.reply)

    def _refuse_misfit(self, scores: Sequence[float], study: Study) -> None:
        """UserError where the unedited model hardly shows the behaviour by its markers: nothing can be taken out."""
        for i, scorer in self.ask.items():
            if isinstance(scorer, Markers) and scores[i] < LEAST_SHOWN:
                named = "" if study.drop() else f" Give a new --journal as well: {study.journal} is of these."
                raise UserError(
                    f"only {scores[i]:.0%} of the {len(scorer.prompts)} positives show the behaviour by --markers in "
                    "the unedited model: the markers do not fit, or these prompts do not bring it out. One of its "
                    f"replies: {' '.join(self.reply.split())[:REPLY]!r}.{named}"
                )

    def _told(self, scores: Sequence[float]) -> str:
        return ", ".join(f"{s.name} {s.told(score)}" for s, score in zip(self.scorers, scores, strict=True))


def _seldom(scorers: Sequence[Scorer], base: Sequence[float]) -> list[str]:
    """A warning where markers fit few of the unedited model's replies."""
    rates = [rate for scorer, rate in zip(scorers, base, strict=True) if isinstance(scorer, Markers)]
    return [
        f"warning: only {rate:.0%} of the positives that were searched on show the behaviour by --markers in the "
        "unedited model: check markers and prompts"
        for rate in rates
        if rate < FEW_SHOWN
    ]


def _number(asked: Any) -> int:
    return -1 if asked is None else asked.number


def _digest(parts: Sequence[bytes]) -> str:
    return blake2b(b"\0".join(parts), digest_size=12).hexdigest()
