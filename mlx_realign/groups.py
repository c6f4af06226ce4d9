# SPDX-License-Identifier: Apache-2.0
"""The micro-batches of grpo and rlvr: prompts -> groups of completions, generated or given -> rewards -> advantages.

What is generated is a function of the policy, the seed and the number of the rollout, so a run that goes on after its
last checkpoint generates the same. With several updates per rollout the groups under way go into the checkpoint.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import advantages as adv
from . import data, layout, rollout, ways
from .batch import Completion, Example, placed
from .errors import UserError
from .feed import Feed, Micro
from .layout import Layout, Need
from .reference import Reference
from .rewards import Group, Judge, Judged, group_measures, mean
from .rollout import Generated
from .sampling import Sampling

KEPT = 8  # of a rollout that are kept in samples.jsonl
PROBE_TOKENS = 32  # of each completion at which the KL to the start is measured
TOLD = 5  # bad rows named in a message


class GroupFeed(Feed):
    """A Feed whose rows become groups: `window` makes a rollout where one is due."""

    def __init__(self, *arguments: Any, config: Any, base: str, say: Any) -> None:
        """arguments: as of Feed. config: of the method. base: fingerprint of the model. say: for the user."""
        self.config, self.base, self.say = config, base, say
        super().__init__(*arguments)
        self.updates = config.updates_per_rollout
        self.steps *= self.updates
        self.place, self.round = 0, -1  # the next prompts, and the rollout under way
        self.pending: list[Micro] = []  # its micro-batches
        self.behaviour: Reference | None = None
        self.behaviour_epoch = -1
        self.judge: Judge | None = None
        self.offline = bool((self.rows.num_completions > 0).any())
        self.online = bool((self.rows.num_completions == 0).any())
        if config.verifier and (self.online or self.held_out is not None):
            self.judge = Judge(config.verifier, config.reward_weights, config.shaping, unsafe_code=config.unsafe_code)
            for note in self.judge.notes:
                say(note)
        for note in ways.notes(self.policy) if self.online else ():
            say(note)
        self.rewards = self.judge is not None and self.held_out is not None
        self._refuse_unfit()

    # ------------------------------------------------------------------ what the loop asks

    def laid_out(self) -> Layout:
        """Shapes for the given completions, and for those that will be generated."""
        given, options = self.rows.num_completions > 0, layout.options(self.policy)
        shapes = super().laid_out().shapes if given.any() else ()
        if not given.all():
            lengths, config = self.rows.prompt_lengths[~given], self.config
            shapes += layout.of_rollouts(lengths, config.group_size, config.max_new_tokens, **options).shapes
        return Layout(shapes, **options)

    def needs(self, found: Layout) -> Iterator[Need]:
        """Rows without completions are counted with completions as long as they may become."""
        whole = Completion(most := np.zeros(self.config.max_new_tokens, np.int32), most == 0)
        for places in layout.spread(self.plan(0)):
            rows = [self.rows[int(i)] for i in places]
            rows = [e if e.completions else e._replace(completions=(whole,) * self.config.group_size) for e in rows]
            yield from (found.need(part) for part in found.parts(rows))

    def window(self, step: int) -> Iterator[Micro]:
        """The micro-batches of an optimizer step, after a rollout where the last one has been used up."""
        made, self.measured, self.samples = (step - 1) // self.updates, {}, []
        if made != self.round:
            self.pending = self._roll(made)
            self.round = made
        yield from self.pending

    def together(self, rows: data.Dataset, window: list[tuple[int, np.ndarray]]) -> Iterator[Micro]:
        """Micro-batches of these rows, generated now where they are; every ratio is to the policy as it is."""
        examples = [rows[int(i)] for _, places in window for i in places]
        groups = self._advantages(self._groups(examples, seed=(self.settings.seed, 2**31)))
        yield from self._micros(groups, 0, ratios=False)

    def epoch_after(self, step: int) -> float:
        """Passes over the prompts after an optimizer step."""
        return self.place / self.per_epoch

    def probe(self) -> Sequence[Example] | data.Dataset:
        """Rows for the KL to the start: those given, or what the start says to a few prompts."""
        rows = self.held_out or self.rows
        if (rows.num_completions > 0).all():
            return rows
        places = np.sort(np.random.default_rng(self.settings.seed).permutation(len(rows))[:8])
        asked = [rows[int(p)] for p in places]
        greedy = Sampling(max_new_tokens=min(PROBE_TOKENS, self.config.max_new_tokens), temperature=0.0)
        said = rollout.rollout(self.policy, [e.prompt for e in asked], greedy)
        whole = lambda one: Completion(one.tokens, np.ones(len(one.tokens), bool))  # noqa: E731
        return [e._replace(completions=(whole(one[0]),)) for e, one in zip(asked, said, strict=True)]

    def rewarded(self) -> dict[str, float] | None:
        """Mean reward of greedy completions of the held-out problems, or None where nothing can judge them."""
        if self.held_out is None or self.judge is None:
            return None
        greedy = Sampling(max_new_tokens=self.config.max_new_tokens, temperature=0.0, stop=self.config.stop)
        said = [one[0] for one in rollout.rollout(self.policy, [e.prompt for e in self.held_out], greedy)]
        judged = self.judge([one.text for one in said], [e.extras["row"] for e in self.held_out])
        earned = mean(judged.rewards[np.isfinite(judged.rewards)])
        found = {"eval_loss": -earned, "eval_reward": earned} | self.judge.measures(judged, prefix="eval_")
        found["eval_completions/mean_length"] = mean([len(one.tokens) for one in said])
        found["eval_completions/clipped_ratio"] = mean([not one.finished for one in said])
        return found

    @property
    def state(self) -> dict[str, Any]:
        """What a run that goes on must know: plain values."""
        under_way = [_packed(micro) for micro in self.pending] if self.updates > 1 else []
        owner = self.behaviour.owner if self.behaviour and self.behaviour_epoch > 0 else None
        place = {"place": self.place, "round": self.round, "behaviour": [self.behaviour_epoch, owner]}
        return place | {"pending": under_way}

    def restore(self, state: dict[str, Any]) -> None:
        """Put `state` back."""
        self.place, self.round = state["place"], state["round"] if state["pending"] else -1
        self.pending = [_unpacked(micro, self.bare) for micro in state["pending"]]
        epoch, owner = state["behaviour"]
        if owner:
            self.behaviour = self._behaviour("now", owner)
            self.behaviour_epoch = epoch

    def close(self) -> None:
        """End the verifiers' processes."""
        super().close()
        if self.judge:
            self.judge.pool.close()
        if self.behaviour:
            self.behaviour.close()

    # ------------------------------------------------------------------ a rollout

    def _roll(self, number: int) -> list[Micro]:
        began, window = time.perf_counter(), self.settings.gradient_accumulation
        self._begin_epoch()
        groups: list[Group] = []
        wanted = window * self.settings.batch_size
        for attempt in range(1 + self.config.dynamic_sampling):
            examples = [self.rows[int(i)] for n in range(window) for i in self.at(self.place + n)]
            self.place += window
            groups += self._groups(examples, seed=(self.settings.seed, number, attempt))
            if sum(group.differs for group in groups) >= wanted:
                break
        useful = [group for group in groups if group.differs]
        if self.config.dynamic_sampling and len(useful) > wanted:
            groups = [group for group in groups if not group.differs] + useful[:wanted]
        self._measure(groups, time.perf_counter() - began)
        return list(self._micros(self._advantages(groups), number * window))

    def _groups(self, examples: list[Example], seed: tuple[int, ...]) -> list[Group]:
        """Each row's given completions with their scores, or new ones with the verifiers'."""
        asked = [e for e in examples if not e.completions]
        made = iter(self._generate(asked, seed))
        given = lambda e: Judged(np.array(e.extras["scores"], np.float64), np.zeros((0, 0)), [])  # noqa: E731
        return [Group(e, e.completions, given(e)) if e.completions else next(made) for e in examples]

    def _generate(self, examples: list[Example], seed: tuple[int, ...]) -> list[Group]:
        if not examples:
            return []
        config, size = self.config, self.config.group_size
        number = int(np.random.SeedSequence(seed).generate_state(1)[0])
        prompts, options = [e.prompt for e in examples], {"group_size": size, "rows": config.rollout_batch}
        said = rollout.rollout(self.policy, prompts, config.sampling, seed=number, **options)
        assert self.judge
        flat = [one for group in said for one in group]
        judged = self.judge([one.text for one in flat], [e.extras["row"] for e in examples for _ in range(size)])
        if config.overlong_buffer:
            lengths = np.array([len(one.tokens) for one in flat])
            penalty = adv.overlong_penalty(lengths, config.max_new_tokens, config.overlong_buffer)
            judged = judged._replace(rewards=judged.rewards + penalty)
        parts = [judged.part(slice(i * size, (i + 1) * size)) for i in range(len(examples))]
        return [
            Group(example, tuple(self._completion(one) for one in group), part, tuple(group))
            for example, group, part in zip(examples, said, parts, strict=True)
        ]

    def _completion(self, one: Generated) -> Completion:
        trained = one.finished or not self.config.mask_truncated
        return Completion(one.tokens, np.full(len(one.tokens), trained))

    # ------------------------------------------------------------------ advantages and batches

    def _advantages(self, groups: list[Group]) -> list[Group]:
        """Groups with advantages in their examples' extras, and without the completions that are not trained on."""
        config, rewards = self.config, np.concatenate([group.judged.rewards for group in groups])
        index = adv.group_index([len(group.completions) for group in groups])
        scale = {"scale": config.scale_rewards}
        if config.loss_type == "raft":
            best = config.raft_threshold is None
            values = adv.raft_selection(rewards, index, best=best, threshold=config.raft_threshold).astype(np.float32)
        elif config.loss_type == "awr":
            values = adv.awr_weights(rewards, index, awr_lambda=config.awr_lambda)
        elif config.advantage == "gdpo":
            assert self.judge
            values = adv.gdpo(np.concatenate([g.judged.scores for g in groups]), self.judge.weights, index)
        elif config.advantage == "grpo":
            values = adv.group_advantages(rewards, index, **scale)
        else:
            values = {"rloo": adv.rloo, "maxrl": adv.maxrl, "asymre": adv.asymre}[config.advantage](rewards, index)
        found = []
        for i, group in enumerate(groups):
            own = values[index == i]
            own = own if group.generated else adv.weigh_negatives(own, config.negative_weight)
            kept = np.flatnonzero(own) if config.loss_type in ("raft", "awr") else np.arange(len(own))
            example = group.example._replace(
                completions=tuple(group.completions[k] for k in kept),
                extras={"advantages": [float(a) for a in own[kept]]},
            )
            generated = tuple(group.generated[k] for k in kept) if group.generated else ()
            found.append(group._replace(example=example, generated=generated))
        if config.zero_variance == "drop" or config.loss_type in ("raft", "awr"):
            useful = [group for group in found if any(group.example.extras["advantages"])]
            found = useful or [_without_say(groups[0])]
        return found

    def _micros(self, groups: list[Group], place: int, *, ratios: bool = True) -> Iterator[Micro]:
        """Micro-batches of groups that were generated, then of those that were given."""
        for kind in (True, False):
            part: list[Group] = []
            for group in (group for group in groups if bool(group.generated) is kind):
                if part and not self._fits([*part, group]):
                    yield self._micro(part, place, ratios)
                    part = []
                part.append(group)
            if part:
                yield self._micro(part, place, ratios)

    def _fits(self, groups: list[Group]) -> bool:
        """Whether these are one micro-batch, by --batch-size and --batch-tokens, and computed together."""
        if len(self.parts([group.example for group in groups])) > 1:
            return False
        prompts = [len(group.example.prompt) for group in groups]
        lengths = [len(completion.tokens) for group in groups for completion in group.example.completions]
        padded = len(prompts) * self.width(max(prompts)) + len(lengths) * self.width(max(lengths))
        return len(groups) <= self.settings.batch_size and padded <= (self.settings.batch_tokens or padded)

    def _micro(self, groups: list[Group], place: int, ratios: bool) -> Micro:
        examples = [group.example for group in groups]
        examples = [e._replace(key=data.key_of(e.prompt, e.completions)) for e in examples]
        batch = self.bare(examples)
        if groups[0].generated:
            batch.extras["sampler_logps"] = placed(batch, [one.logps for group in groups for one in group.generated])
            if self.updates > 1 and ratios:
                batch.extras["old_logps"] = self.policy.token_logps(batch)
            if self.reference:
                with self.policy.reference(self.reference.kind):
                    batch.extras["ref_token_logps"] = self.policy.token_logps(batch)
        else:
            if self.reference:
                batch.extras.update(self.reference.extras(examples, batch))
            if self.behaviour and ratios:
                batch.extras["old_logps"] = self.behaviour.extras(examples, batch)["ref_token_logps"]
        mx.eval(batch.extras)
        return Micro(place, examples, batch)

    def _begin_epoch(self) -> None:
        """Given completions: whose ratio it is to, from here on."""
        epoch = self.place // self.per_epoch
        if not self.offline or self.config.behaviour == "step" or self.config.loss_type in ("raft", "awr"):
            return
        if self.behaviour is None:
            self.behaviour, self.behaviour_epoch = self._behaviour("init"), 0
        if self.config.behaviour == "epoch" and epoch != self.behaviour_epoch:
            self.behaviour.close()
            self.behaviour, self.behaviour_epoch = self._behaviour("now"), epoch
            for rows in self.plan(epoch):
                examples = [e for i in rows if (e := self.rows[int(i)]).completions]
                if examples:
                    self.behaviour.extras(examples, self.bare(examples))
            self.behaviour.seal()

    def _behaviour(self, kind: str, owner: str | None = None) -> Reference:
        found = Reference(self.policy, kind, self.base, self.say, tokens=True)
        if owner:
            found.owner = owner
            found.seal()
        return found

    def _measure(self, groups: list[Group], seconds: float) -> None:
        """Metrics of a rollout, and the completions kept."""
        found, made = group_measures(groups), [group for group in groups if group.generated]
        if made and self.judge:
            parts = [group.judged for group in made]
            reasons = [own for part in parts for own in part.reasons]
            rewards, scores = (np.concatenate([getattr(p, name) for p in parts]) for name in ("rewards", "scores"))
            both = Judged(rewards, scores, reasons)
            found |= self.judge.measures(both)
            tokens = sum(len(one.tokens) for group in made for one in group.generated)
            found |= {"rollout_s": seconds, "rollout_tokens_per_second": tokens / seconds}
            self.samples = self.judge.samples(made, self.policy.tokenizer.decode, KEPT)
        self.measured = found

    # ------------------------------------------------------------------ settings

    def _refuse_unfit(self) -> None:
        """UserError for rows nobody can judge, and for settings that rows like these make pointless or impossible."""
        config, settings = self.config, self.settings
        if self.online and self.judge is None:
            raise UserError("--verifier is needed: the policy answers rows without responses, and nobody judges them")
        if self.held_out is not None and (self.held_out.num_completions == 0).any() and not config.verifier:
            raise UserError("--eval-data has rows without responses, which need --verifier to be judged")
        if self.offline and settings.full and config.behaviour != "step" and config.loss_type not in ("raft", "awr"):
            raise UserError(
                "--full with given responses: the ratio to an earlier policy would need a second copy of the weights; "
                "take --behaviour step, --loss-type raft or awr, or train an adapter"
            )
        if self.offline and not self.online and config.dynamic_sampling:
            raise UserError("--dynamic-sampling draws new completions, and every row has its own: drop it")
        if self.offline and config.advantage == "gdpo":
            raise UserError("--advantage gdpo normalises verifiers one by one, and given responses have one score each")
        if not self.offline:
            for flag, changed, where in (
                ("negative-weight", config.negative_weight != 1, "given responses"),
                ("behaviour", config.behaviour != "epoch", "given responses"),
                (
                    "off-policy-threshold",
                    config.off_policy_threshold is not None and config.updates_per_rollout == 1,
                    "--updates-per-rollout above 1, or given responses",
                ),
            ):
                if changed:
                    raise UserError(f"--{flag} is for {where}; here it would do nothing: drop it")
        if self.judge and self.online and not settings.skip_bad_rows:
            rows = ((e.line, e.extras["row"]) for e in self.rows if not e.completions)
            if bad := self.judge.pool.check(rows):
                told = "\n".join(f"  line {line}: {reason}" for line, reason in bad[:TOLD])
                more = f"\n  ... and {len(bad) - TOLD} more" if len(bad) > TOLD else ""
                raise UserError(
                    f"{settings.data}: {len(bad)} rows cannot be judged by --verifier {config.verifier}\n{told}{more}\n"
                    "Mend them, name another verifier, or use --skip-bad-rows: they then earn nothing"
                )


def _without_say(group: Group) -> Group:
    """A group that moves nothing, for a step where no group differs."""
    extras = {"advantages": [0.0] * len(group.completions)}
    return group._replace(example=group.example._replace(completions=group.completions, extras=extras))


def _packed(micro: Micro) -> dict[str, Any]:
    """A micro-batch as plain values, to the last bit."""
    rows = [
        [e.prompt.tolist(), [[c.tokens.tolist(), c.mask.tolist()] for c in e.completions], e.line, e.key, e.extras]
        for e in micro.examples
    ]
    kept = ("sampler_logps", "old_logps", "ref_token_logps")
    arrays = {name: np.array(micro.batch.extras[name]).tolist() for name in kept if name in micro.batch.extras}
    return {"place": micro.place, "rows": rows, "arrays": arrays}


def _unpacked(packed: dict[str, Any], bare: Any) -> Micro:
    examples = [
        Example(np.array(p, np.int32), tuple(Completion(np.array(t, np.int32), np.array(m)) for t, m in cs), n, key, x)
        for p, cs, n, key, x in packed["rows"]
    ]
    batch = bare(examples)
    batch.extras.update({name: mx.array(np.array(v, np.float32)) for name, v in packed["arrays"].items()})
    return Micro(packed["place"], examples, batch)
