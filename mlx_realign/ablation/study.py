# SPDX-License-Identifier: Apache-2.0
"""What a search tries next, and its journal.

The first is the middle of all ranges. Then Optuna's multivariate TPE (Bergstra 2011; Ozaki 2022 for several objectives)
draws kernels, the first ones at random and at full strength. As often at most a trial of the front is taken again, only
weaker, where the front has its widest gap: the KL falls with about the square of the strength and the behaviour comes
back more slowly, so that one good shape at several strengths draws out what other shapes leave full of holes.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .kernel import STRENGTH, Kernel, Space
from .pareto import POWER, Trial, weaker
from .scorers import Asked, Scorer

STUDY = "ablation"
MARK = "weaker than"  # on a trial: the number of the one that it is, but for its strength
AT_ONCE = 2  # trials under way that are others made weaker; one until the first trial is whole
ALIKE = 0.1  # strengths that differ by less than this share are not tried of one trial again


class Study:
    """Optuna's study in a journal file."""

    def __init__(
        self, journal: Path, scorers: list[Scorer], space: Space, startup: int, seed: int, max_kl: float | None
    ) -> None:
        optuna = load_optuna()
        self.optuna, self.scorers, self.space, self.startup = optuna, scorers, space, startup
        self.seed, self.max_kl = seed, max_kl
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal.parent.mkdir(parents=True, exist_ok=True)
        self.journal, self.began = journal, not journal.is_file()
        sense = [optuna.study.StudyDirection.MINIMIZE] * len(scorers)
        with _reading(journal):
            self.study = optuna.create_study(
                storage=_storage(journal), study_name=STUDY, directions=sense, load_if_exists=True
            )
        for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # it was cut off: it begins anew
            wanted = trial.system_attrs.get("fixed_params", {}) | trial.params
            self.study.enqueue_trial(wanted, user_attrs=trial.user_attrs)

    def claim(self, asked: dict[str, Any]) -> None:
        """Note what is searched. UserError where the journal is of another search."""
        held = self.study.user_attrs.get("search")
        if held is None:
            self.study.set_user_attr("search", asked)
        elif different := [name for name, value in asked.items() if held.get(name) != value]:
            raise UserError(
                f"{self.journal}: is the journal of a search with another {', '.join(different)}. "
                "Go on with what it was made with, or name a new file."
            )

    def drop(self) -> bool:
        """Remove the journal, whose trials are of no use, if this began it; whether it did."""
        if self.began:
            self.journal.unlink(missing_ok=True)
        return self.began

    @property
    def base(self) -> tuple[float, ...] | None:
        """Scores of the unedited model, None until they are known."""
        held = self.study.user_attrs.get("base")
        return None if held is None else tuple(held)

    @base.setter
    def base(self, scores: Sequence[float]) -> None:
        self.study.set_user_attr("base", list(scores))

    def ask(self, under_way: Sequence[Trial] = ()) -> tuple[Any, Kernel]:
        """The next trial; what is drawn depends on the seed, its number and what is known of the trials before it.

        under_way: trials that are not whole, with what is guessed of their scores.
        """
        known = self.study.get_trials(deepcopy=False)
        waiting = sum(trial.state == self.optuna.trial.TrialState.WAITING for trial in known)
        drawn = sum(MARK not in trial.user_attrs for trial in known)
        if not waiting:
            if (again := self._again(known, under_way)) is not None:
                number, strength = again
                self.study.enqueue_trial(known[number].params | {"strength": strength}, user_attrs={MARK: number})
            elif not known:
                self.study.enqueue_trial(self.space.middle() | {"strength": STRENGTH[1]})
            elif drawn < self.startup:
                self.study.enqueue_trial({"strength": STRENGTH[1]})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            self.study.sampler = self.optuna.samplers.TPESampler(
                n_startup_trials=len(known) + 1 if drawn < self.startup else 0,
                n_ei_candidates=128,
                multivariate=True,
                constant_liar=True,
                seed=int(np.random.SeedSequence([self.seed, len(known) - waiting]).generate_state(1)[0]),
            )
            asked = self.study.ask()
            return asked, self.space.draw(asked)

    def _again(self, known: Sequence[Any], under_way: Sequence[Trial]) -> tuple[int, float] | None:
        """Number and strength of a trial to take once more.

        Few at a time, so that it is seen what the others gave, and never more than are drawn.
        """
        tried = [trial for trial in known if MARK in trial.user_attrs]
        done, base = self.trials(), self.base
        begins = all(trial.pruned for trial in done)
        at_once = sum(not trial.state.is_finished() for trial in tried)
        if at_once >= (1 if begins else AT_ONCE) or 2 * len(tried) >= len(known):
            return None
        if base is None:  # not judged yet: at its worst
            base = tuple(1.0 if isinstance(scorer, Asked) else 0.0 for scorer in self.scorers)
        here = [t for t in under_way if begins or MARK in known[t.number].user_attrs]
        scores = {trial.number: trial.scores for trial in [*done, *under_way]}
        gaps = weaker(done + [self._expected(known, t, scores, base) for t in here], self.scorers, base)
        for parent, times in [*gaps, *((trial, self.too_far(trial.scores)) for trial in done)]:
            own = known[parent.number].params
            strength = max(STRENGTH[0], times * own["strength"])
            before = [t.params["strength"] for t in known if t.params | {"strength": own["strength"]} == own]
            if all(abs(strength / other - 1) > ALIKE for other in before):
                return parent.number, strength
        return None

    def too_far(self, scores: Sequence[float]) -> float:
        """What to make an edit times that is above `max_kl`, so that it is below; 1 for one that is not above it."""
        kls = [score for score, scorer in zip(scores, self.scorers, strict=True) if scorer.name.startswith("kl")]
        if self.max_kl is None or max(kls, default=0.0) <= self.max_kl:
            return 1.0
        return (0.9 * self.max_kl / max(kls)) ** (1 / POWER)

    def _expected(
        self, known: Sequence[Any], trial: Trial, scores: Mapping[int, Sequence[float]], base: Sequence[float]
    ) -> Trial:
        """One under way: who is weaker than another is expected to be as much nearer to the unedited model."""
        parent = known[trial.number].user_attrs.get(MARK)
        if parent is None or "strength" not in known[parent].params:
            return trial
        left = known[trial.number].params["strength"] / known[parent].params["strength"]
        each = zip(self.scorers, trial.scores, scores.get(parent, base), base, strict=True)
        guess = (max(s, left * p + (1 - left) * b) if isinstance(kind, Asked) else s for kind, s, p, b in each)
        return trial._replace(scores=tuple(guess))

    def tell(self, asked: Any, kernel: Kernel, scores: Sequence[float], values: Sequence[float], pruned: bool) -> None:
        """What a trial came to. values: for the sampler, a guess where it was left early."""
        asked.set_user_attr("kernel", kernel.plain())
        asked.set_user_attr("scores", list(scores))
        asked.set_user_attr("pruned", pruned)
        self.study.tell(asked, list(values))

    def trials(self) -> list[Trial]:
        """All that are whole or pruned."""
        return _done(self.study)


def load_optuna() -> Any:
    """The module. UserError where it is not installed."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise UserError("--search needs Optuna: pip install 'mlx-realign[search]'") from error
    return optuna


def held(journal: Path) -> list[Trial]:
    """The trials of a journal that are whole or pruned, none where it is not there. UserError for another file."""
    if not journal.is_file() or not journal.stat().st_size:
        return []
    with _reading(journal):
        return _done(load_optuna().load_study(storage=_storage(journal), study_name=STUDY))


def _storage(journal: Path) -> Any:
    storages = load_optuna().storages
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(journal)))


@contextmanager
def _reading(journal: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{journal}: is no journal of a search ({error}). Name another file.") from error


def _done(study: Any) -> list[Trial]:
    found = study.get_trials(deepcopy=False, states=[load_optuna().trial.TrialState.COMPLETE])
    return [
        Trial(t.number, Kernel.read(t.user_attrs["kernel"]), tuple(t.user_attrs["scores"]), t.user_attrs["pruned"])
        for t in found
    ]
