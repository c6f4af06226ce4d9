# SPDX-License-Identifier: Apache-2.0
"""Trains a policy by any method: `mlx-realign train --method dpo --model M --data D`. One loop, blind to the method.

Reading order: `main` -> `run` (what is needed, in order) -> `Loop.run` (THE loop) -> `Loop.step` (one optimizer step).
"""

import math
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from . import adapter, blas, checkpoint, config, data, drift, fingerprint, guard, methods, optim, prepare, selfcheck
from .batch import LossOutput
from .checkpoint import DiskFull
from .errors import UserError
from .estimate import estimate, facts, shares
from .feed import Feed
from .groups import GroupFeed
from .guard import Fault, Interrupted, interruptible
from .policy import Policy
from .prepare import Rows
from .progress import Reporter, duration
from .reference import Reference
from .runfolder import RunFolder
from .steering.train_with import TrainWith
from .sums import Window, add, averages, number_of

SHOWN = 300  # characters of a prompt's end and of a completion's beginning


def main(argv: list[str]) -> int:
    """The command: 0 done, 1 a fault, 2 wrong input, 130, 143 or 129 (SIGINT, SIGTERM, SIGHUP) ended after saving."""
    if words := config.handed_over(argv):
        return import_module(f".{words[0]}", __package__).main(words[1:])
    settings, method, own = config.parse(argv)
    with Reporter(as_json=settings.json) as reporter:
        try:
            run(settings, method, own, reporter=reporter)
        except (Fault, DiskFull) as fault:
            reporter.fail(f"stopped: {fault}")
            return 1
        except Interrupted as stop:
            reporter.fail(str(stop))
            return 128 + stop.number
    return 0


def train(policy: Policy | None = None, *, method: str, data: Rows, **options: Any) -> dict[str, Any]:
    """Train from Python with fields of TrainSettings and of the method's Config as options; returns its last metrics.

    With a policy, that one is trained in place, and what it is now is the reference; else `model=` is loaded.
    data: path, hub id or a list of rows. Raises UserError for wrong input, Fault or DiskFull where training cannot go
    on, Interrupted after Ctrl-C.
    """
    carried = [name for name in options if name.startswith("lora_") and name != "lora_dropout" or name.endswith("ora")]
    if carried and policy and adapter.adapters_of(policy.model):
        raise UserError(f"{carried[0]}: the policy carries an adapter already, which is trained on; leave it out")
    model = options.pop("model", policy.name if policy else "")
    named = data if isinstance(data, str | Path) else "rows"
    settings, method, own = config.build(method, options | {"model": model, "data": str(named)})
    with Reporter(as_json=settings.json) as reporter:
        return run(settings, method, own, policy=policy, rows=data, reporter=reporter)


def run(
    settings: config.TrainSettings,
    method: str,
    own: Any,
    *,
    reporter: Reporter,
    policy: Policy | None = None,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """Everything a run needs, in order; returns the last metrics row (a dry run: its estimates)."""
    module = methods.find(method)
    prepare.refuse_pointless(settings, module, own)
    folder = RunFolder(settings, method, own)
    with nullcontext() if settings.dry_run else folder.held(reporter.say):
        with reporter.waiting(f"loading {settings.model}"):
            policy = prepare.ready(policy, settings)
            checks = selfcheck.run(policy)
            selfcheck.set_packing(policy, on=settings.pack)
        for line in filter(blas.untold, (*policy.notes, *checks.notes, *methods.notes(module, own))):
            reporter.say(line)
        load = prepare.loader(policy, module, settings)
        with reporter.waiting("reading the data"):
            train_rows = load(rows if rows is not None else settings.data)
            held_out = prepare.held_out_rows(settings, rows, load)
        for line in train_rows.report["notes"]:
            reporter.say(line)
        loop = Loop(policy, module, own, settings, train_rows, held_out, folder, reporter)
        found = facts(loop) | {"self_check": checks.results}
        if not settings.dry_run:
            folder.open(loop.identity, found)
            return loop.run()
        found |= estimate(loop) | shares(loop)
        loop.close()
        reporter.facts(found)
        return found


class Loop:
    """The state of a run; `run` is the loop."""

    def __init__(
        self,
        policy: Policy,
        module: Any,
        own: Any,
        settings: config.TrainSettings,
        rows: data.Dataset,
        held_out: data.Dataset | None,
        folder: RunFolder,
        reporter: Reporter,
    ) -> None:
        self.policy, self.settings, self.folder, self.reporter = policy, settings, folder, reporter
        self.config = own
        self.loss = partial(module.loss, config=own)
        self.base = fingerprint.base(policy.model)
        kind = module.reference(own)
        needs = methods.needs(module, own)
        policy.prepare_for(needs, getattr(own, "temperature", 1.0) or 1.0)
        tokens = "ref_tokens" in needs
        self.reference = Reference(policy, kind, self.base, reporter.say, tokens=tokens) if kind else None
        make = partial(GroupFeed, config=own, base=self.base, say=reporter.say) if module.FORMAT == "groups" else Feed
        self.feed = make(policy, self.reference, settings, rows, held_out, methods.shared(module, own))
        self.steps = self.feed.steps
        self.peak_rate = settings.learning_rate or module.LEARNING_RATE / (10 if settings.full else 1)
        self.optimizer = optim.Updater(settings, policy.model.trainable_parameters())
        held = held_out.fingerprint if held_out else ""
        start = "" if policy.starts_at_base else fingerprint.adapters(policy.model)  # a fresh one is seed and settings
        self.identity = {"model": self.base, "adapter": start, "data": rows.fingerprint, "eval_data": held}
        self.done = self.tokens = self.waited = 0
        self.norms, self.proven = guard.Norms(), False
        from_start = kind == "init" or kind == "base" and policy.starts_at_base  # what rewards are relative to
        probed = rows if settings.kl_every == 0 else self.feed.probe()
        self.drift = drift.Drift(policy, settings, probed, self.steps, relative=from_start)
        self.best: tuple[float, int] | None = None  # loss and step of the best evaluation
        self.peak_gb = 0.0
        self.steered = TrainWith(policy, settings.steer)
        self.identity |= {"steer": self.steered.identity} if self.steered.steers else {}

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Steps with evaluations and checkpoints between them, until all are done or something says stop."""
        try:
            if self.settings.full and self.reference:
                self.fill_reference()
            self.drift.begin()
            self.resume()
            self.reporter.start(self.done, self.steps)
            self.loop()
            return self.finish()
        except DiskFull as full:
            raise DiskFull(f"{full}. Mend that and go on with --resume. {self.folder.left_behind()}") from full
        except Fault as fault:
            raise Fault(f"{fault}. {self.folder.left_behind()}") from fault
        finally:
            self.close()

    def loop(self) -> None:
        """THE loop."""
        save_every = self.settings.save_every or min(1000, max(1, self.steps // 20))
        eval_every = self.settings.eval_every or -(-self.feed.per_epoch // self.settings.gradient_accumulation)
        limit = self.drift.limit
        with self.folder.metrics() as metrics, interruptible() as asked:
            if not self.done and limit.keep(0, 0.0):
                self.save()
            while not self.over():
                evaluating = bool(self.feed.held_out) and (self.done + 1) % eval_every == 0
                with guard.enough_memory(self.done + 1):
                    row = self.step()
                    row |= self.drift.measure(self.done, evaluating)
                self.tell_memory(row["peak_memory_gb"])
                metrics.write(row)
                self.reporter.row(row)
                self.show(self.feed.samples)
                for line in self.drift.judge(row):
                    self.reporter.say(line)
                found: dict[str, Any] = {}
                if self.feed.held_out and limit.back_to is None and (evaluating or self.over()):
                    found = self.evaluate()
                    metrics.write(found)
                    self.reporter.row(found)
                better = bool(found) and self.judge(found["eval_loss"])
                better |= limit.keep(self.done, row.get("kl"), found.get("eval_loss"))
                if better or self.done % save_every == 0 or self.over() or asked():
                    self.save()
                if (number := asked()) and not self.over():
                    raise Interrupted(f"interrupted after step {self.done}; go on with --resume", number)

    def over(self) -> bool:
        """Whether all steps are done, --early-stop evaluations in a row brought nothing better, or --kl-max says so."""
        early = 0 < (self.settings.early_stop or 0) <= self.waited
        return self.done >= self.steps or early or self.drift.limit.stopped

    def step(self) -> dict[str, Any]:
        """One optimizer step: gradients summed over the window, divided once by its count, clipped, applied."""
        started, number, model = time.perf_counter(), self.done + 1, self.policy.model
        mx.reset_peak_memory()
        window, lines, tokens = Window(), [], 0
        for micro in self.feed.window(number):
            self.set_dropout(micro.place)
            with self.steered.gradients():
                part, slope = self.policy.gradients(micro.batch, self.loss, wait=False)
            window.add(part, slope)
            lines.append((micro.lines, part.total))
            tokens += micro.tokens
            del part, slope
        self.set_dropout(None)
        out, grads = window.take()
        count = mx.maximum(out.count, 1.0)
        clipped, norm = self.optimizer.clip(grads, count)
        del grads
        row = {"step": number, **averages(out, loss=out.total / count, grad_norm=norm)}
        self.norms.refuse(number, row["loss"], row["grad_norm"], lines)
        rate = optim.learning_rate(self.settings, self.peak_rate, number, self.steps) * self.drift.limit.factor
        idle = row["grad_norm"] == 0 and self.feed.measured.get("frac_reward_zero_std") == 1  # no group differs: wait
        before = None if self.proven or idle else guard.contents(model.trainable_parameters())
        self.optimizer.update(model, clipped, rate)
        if before:
            self.prove_learning(before, row["grad_norm"], rate)
            self.proven = True
        self.done, self.tokens = number, self.tokens + tokens
        took, peak = time.perf_counter() - started, mx.get_peak_memory() / 1e9
        row |= {"learning_rate": rate, **self.feed.told, "num_tokens": self.tokens}
        speed = {"tokens_per_second": tokens / took, "step_s": took, "peak_memory_gb": peak}
        return row | {"epoch": self.feed.epoch_after(number)} | speed

    def evaluate(self) -> dict[str, Any]:
        """Loss and metrics over held-out rows, no gradient, no dropout; rewards where completions are judged."""
        if earned := self.feed.rewarded():
            return {"step": self.done, **earned}
        total: LossOutput | None = None
        for i, count, micro in self.feed.evaluation():
            out = self.policy.losses(micro.batch, self.loss)
            if not math.isfinite(loss := number_of(out.total)):
                raise Fault(
                    f"step {self.done}: eval_loss is {loss}; held-out rows at lines {guard.listed(micro.lines)}"
                )
            total = out if total is None else add(total, out)
            self.reporter.busy("evaluation", i + 1, count)
        assert total is not None
        loss = number_of(total.total / mx.maximum(total.count, 1.0))
        return {"step": self.done, "eval_loss": loss} | {f"eval_{k}": v for k, v in averages(total).items()}

    def judge(self, loss: float) -> bool:
        """Whether this evaluation is the best so far; its checkpoint is kept."""
        if self.best is None or loss < self.best[0]:
            self.best, self.waited = (loss, self.done), 0
            return True
        self.waited += 1
        return False

    def finish(self) -> dict[str, Any]:
        """Write the result: the last state, unless --early-stop or --kl-action say which. Returns the last row."""
        self.reporter.stop()
        at, back_to = self.folder.at, self.drift.limit.back_to
        if back_to is not None:
            checkpoint.restore(at(back_to), self.policy.model, None)
        elif self.best and self.best[1] != self.done and (best := at(self.best[1])).exists():
            if self.settings.early_stop:
                checkpoint.restore(best, self.policy.model, None)
            which = "written" if self.settings.early_stop else f"in {best}; the last state is written"
            worth = f"reward {-self.best[0]:.4f}" if self.feed.rewards else f"loss {self.best[0]:.4f}"
            self.reporter.say(f"best evaluation: {worth} at step {self.best[1]}, which is {which}")
        target = self.folder.write_result(self.policy)
        self.reporter.say(
            f"done: {self.done} steps, {self.tokens:,} tokens, peak memory {self.peak_gb:.2f} GB "
            f"in {duration(time.monotonic() - self.reporter.began)}; written to {target}"
        )
        return self.folder.last_row()

    # ------------------------------------------------------------------ going on and stopping

    def close(self) -> None:
        """The policy is left as it was but for its weights."""
        self.feed.close()
        self.steered.remove()

    def save(self) -> None:
        """A checkpoint at this step; older ones go, but for the best and the one to roll back to."""
        model, place = self.policy.model, {"step": self.done, "tokens": self.tokens, "waited": self.waited}
        guard.refuse_broken_weights(self.done, model.trainable_parameters())
        norms = [self.norms.first, self.norms.last]
        state = place | {"best": self.best, "norms": norms, "drift": self.drift.state, "feed": self.feed.state}
        state |= {"run": self.folder.id}
        checkpoint.save(self.folder.at(self.done), model, self.optimizer, state, base_model=self.policy.name)
        self.folder.prune(self.best and self.best[1], self.drift.limit.safe_step)

    def resume(self) -> None:
        """Back to the newest checkpoint, where there is one and it was asked for."""
        if not self.settings.resume:
            return
        if self.folder.found:
            with checkpoint.within(self.folder.found, self.folder.state, self.steps) as state:
                checkpoint.restore(self.folder.found, self.policy.model, self.optimizer)
                self.done, self.tokens, self.waited = (state[name] for name in ("step", "tokens", "waited"))
                self.norms.first, self.norms.last = state["norms"]
                self.best = (state["best"][0], state["best"][1]) if state["best"] else None
                self.drift.restore(state.get("drift", {}))
                self.feed.restore(state.get("feed", {}))
            self.proven = self.done > 0
            self.folder.prune(self.best and self.best[1], self.drift.limit.safe_step)  # a killed run may not have
        self.folder.cut()
        self.reporter.say(f"going on after step {self.done} of {self.steps}")

    def show(self, samples: list[dict[str, Any]]) -> None:
        """Keep what was generated; now and then, one to look at."""
        if not samples:
            return
        self.folder.keep_samples([{"step": self.done, **sample} for sample in samples])
        every = getattr(self.config, "show_every", 0)
        if self.done % (max(1, self.steps // 10) if every is None else every or self.steps + 1) == 0:
            best = max(samples, key=lambda sample: sample["reward"] or 0.0)
            self.reporter.say(f"reward {best['reward']}: {best['prompt'][-SHOWN:]!r} -> {best['completion'][:SHOWN]!r}")

    def tell_memory(self, peak_gb: float) -> None:
        """Remember the peak, and say once where it is above what the user wants."""
        limit = self.settings.memory_limit
        if limit and self.peak_gb <= limit < peak_gb:
            self.reporter.say(
                f"a step took {peak_gb:.2f} GB, more than --memory-limit {limit:g}: MLX could do with no less. "
                "Lower --batch-size, --batch-tokens or --max-length, or add --grad-checkpoint"
            )
        self.peak_gb = max(self.peak_gb, peak_gb)

    def prove_learning(self, before: dict[str, str], norm: float, rate: float) -> None:
        """After the first optimizer step that has a gradient: trained weights moved, the base did not; else Fault."""
        moved = guard.prove_learning(before, self.policy.model.trainable_parameters(), norm, rate)
        if not self.settings.full and fingerprint.base(self.policy.model) != self.base:
            raise Fault(f"step {self.done + 1}: the optimizer moved weights of the frozen base")
        base = "" if self.settings.full else ", the base is unchanged"
        told = f"{moved} of {len(before)} trained tensors moved{base}"
        self.reporter.say(f"step {self.done + 1} is proven to learn: {told}")

    def fill_reference(self) -> None:
        """With full fine-tuning the reference is gone after step 1: all its numbers are computed before."""
        assert self.reference  # in the first epoch's own batches: then its losses start at exactly ln 2
        for i, count, _ in chain(self.feed.first_epoch(), self.feed.evaluation() if self.feed.held_out else ()):
            self.reporter.busy("reference log-probs", i + 1, count)
        self.reference.seal()

    def set_dropout(self, place: int | None) -> None:
        """Dropout masks for a micro-batch, a function of seed and place, so a resumed run draws the same; None: off."""
        if not self.settings.lora_dropout:
            return
        if place is None:
            adapter.set_dropout_key(self.policy.model, None)
            return
        seed = np.random.default_rng([self.settings.seed, place]).integers(2**32)
        adapter.set_dropout_key(self.policy.model, mx.random.key(int(seed)))
        if self.policy.workers.pool:  # other threads use them
            mx.eval([layer._dropout_key for layer in adapter.adapters_of(self.policy.model).values()])


class _Callable(ModuleType):
    """`mlx_realign.train` is this module once anything has imported it, and is meant to be called like its function."""

    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        return train(*args, **options)


if __name__ == "__main__":
    from .cli import run as run_command

    raise SystemExit(run_command(main))

sys.modules[__name__].__class__ = _Callable
