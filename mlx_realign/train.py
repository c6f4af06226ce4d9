# SPDX-License-Identifier: Apache-2.0
"""Trains a policy by any method: `mlx-realign train --method dpo --model M --data D`. One loop, blind to the method.

Reading order: `main` -> `run` (what is needed, in order) -> `Loop.run` (THE loop) -> `Loop.step` (one optimizer step).
"""

import math
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from . import adapter, checkpoint, config, data, methods, optim, selfcheck
from .batch import Batch, Example, LossOutput
from .estimate import estimate
from .loading import frozen_hash
from .policy import Policy
from .progress import Reporter
from .reference import Reference
from .runfolder import RunFolder

EXPLODED = 1000.0  # a gradient norm so many times the median of the run stops it
Rows = str | Path | Sequence[dict[str, Any]]


class Fault(Exception):
    """Training cannot go on; the message says why, and the last good checkpoint stays."""


class Interrupted(Exception):
    """Stopped by the user after a checkpoint was saved."""


def main(argv: list[str]) -> int:
    """The command: 0 done, 1 a fault, 2 wrong input, 130 interrupted after saving."""
    settings, method, own = config.parse(argv)
    with Reporter(as_json=settings.json) as reporter:
        try:
            run(settings, method, own, reporter=reporter)
        except (Fault, checkpoint.DiskFull) as fault:
            reporter.say(f"stopped: {fault}")
            return 1
        except Interrupted as stop:
            reporter.say(str(stop))
            return 130
    return 0


def train(policy: Policy | None = None, *, method: str, data: Rows, **options: Any) -> dict[str, Any]:
    """Train from Python with fields of TrainSettings and of the method's Config as options; returns the last metrics row.

    With a policy, that one is trained in place; else `model=` is loaded. data: path, hub id or a list of rows.
    Raises UserError for wrong input, Fault where training cannot go on.
    """
    model = options.pop("model", policy.name if policy else "")
    named = data if isinstance(data, str | Path) else "rows"
    settings, method, own = config.build(method, options | {"model": model, "data": str(named)})
    return run(settings, method, own, policy=policy, rows=data, reporter=Reporter(as_json=settings.json))


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
    folder = RunFolder(Path(settings.output), settings, method, own)
    if not settings.dry_run:
        folder.refuse_other_run()
    if policy is None:
        policy = Policy.from_settings(settings)
    else:
        policy.prepare(settings)
    checks = selfcheck.run(policy)
    for line in (*policy.notes, *checks.notes):
        reporter.say(line)
    load = partial(data.load, tokenizer=policy.tokenizer, format=module.FORMAT, settings=settings)
    train_rows = load(rows if rows is not None else settings.data)
    held_out = _held_out(settings, rows, load)
    for line in train_rows.report["notes"]:
        reporter.say(line)
    loop = Loop(policy, module, own, settings, train_rows, held_out, folder, reporter)
    facts = loop.facts() | {"self_check": checks.results}
    if settings.dry_run:
        facts |= estimate(policy, loop)
        for name, value in facts.items():
            reporter.say(f"{name}: {value}")
        return facts
    folder.open(facts)
    return loop.run()


def _held_out(settings: config.TrainSettings, rows: Rows | None, load: Any) -> data.Dataset | None:
    if settings.eval_data:
        return load(settings.eval_data)
    named = rows if rows is not None else settings.data
    return load(named, split="valid") if isinstance(named, str | Path) and data.has_split(named, "valid") else None


class Window(NamedTuple):
    """The rows of one micro-batch, and the batch made of them."""

    examples: list[Example]
    batch: Batch


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
        self.policy, self.module, self.own, self.settings = policy, module, own, settings
        self.rows, self.held_out, self.folder, self.reporter = rows, held_out, folder, reporter
        kind = module.reference(own)
        self.reference = Reference(policy, kind) if kind else None
        self.loss = partial(module.loss, config=own)
        self.peak_rate = settings.learning_rate or module.LEARNING_RATE / (10 if settings.full else 1)
        self.optimizer = optim.make(settings)
        self.width = policy.width if policy.compiled else (lambda n: n)
        self.plans: dict[int, list[Any]] = {}
        self.per_epoch = len(self.plan(0))
        self.micro = max(1, round(settings.epochs * self.per_epoch))
        self.steps = settings.steps or math.ceil(self.micro / settings.gradient_accumulation)
        self.micro = self.steps * settings.gradient_accumulation if settings.steps else self.micro
        self.done, self.tokens, self.norms = 0, 0, []
        self.best: tuple[float, int] | None = None
        self.waited = 0
        self.last: dict[str, Any] = {}

    # ------------------------------------------------------------------ batches

    def plan(self, epoch: int) -> list[Any]:
        """Rows of each micro-batch of an epoch; a function of the seed, so a resumed run sees the same."""
        if epoch not in self.plans:
            s = self.settings
            self.plans = {
                epoch: data.plan(
                    self.rows,
                    batch_size=s.batch_size,
                    batch_tokens=s.batch_tokens,
                    seed=s.seed,
                    epoch=epoch,
                    shuffle=s.shuffle,
                )
            }
        return self.plans[epoch]

    def window(self, step: int) -> Iterator[Window]:
        """Micro-batches of an optimizer step (from 1)."""
        size = self.settings.gradient_accumulation
        for index in range((step - 1) * size, min(step * size, self.micro)):
            epoch, place = divmod(index, self.per_epoch)
            yield self.collate([self.rows[int(i)] for i in self.plan(epoch)[place]])

    def collate(self, examples: list[Example]) -> Window:
        """The batch of these rows, with the reference's log-probs where the method needs them."""
        batch = data.collate(examples, width=self.width)
        if self.reference:
            batch.extras["ref_logps"] = self.reference.totals(examples, batch)
        return Window(examples, batch)

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Optimizer steps with evaluation and checkpoints between them, until all are done or something says stop."""
        self.resume()
        if self.settings.full and self.reference:
            self.fill_reference()
        save_every = self.settings.save_every or min(1000, max(1, self.steps // 20))
        eval_every = self.settings.eval_every or math.ceil(self.per_epoch / self.settings.gradient_accumulation)
        self.reporter.start(self.done, self.steps)
        with self.folder.metrics() as metrics, interruptible() as asked:
            while self.done < self.steps:
                self.last = self.step()
                metrics.write(self.last)
                self.reporter.row(self.last)
                final = self.done == self.steps
                stop = False
                if self.held_out and (self.done % eval_every == 0 or final):
                    row = self.evaluate()
                    metrics.write(row)
                    self.reporter.row(row)
                    stop = self.worse_for_too_long(row)
                if self.done % save_every == 0 or final or stop or asked():
                    self.save()
                if asked() and not final:
                    raise Interrupted(f"interrupted after step {self.done}; go on with --resume")
                if stop:
                    break
        self.finish()
        return self.last

    def step(self) -> dict[str, Any]:
        """One optimizer step: gradients summed over the window, divided once by its count, clipped, applied."""
        started, number = time.perf_counter(), self.done + 1
        mx.reset_peak_memory()
        adapter.set_dropout_key(self.policy.model, self.dropout_key(number))
        out, grads, windows = None, None, []
        for window in self.window(number):
            windows.append(window.examples)
            self.tokens += tokens_of(window.examples)
            part, slope = self.policy.gradients(window.batch, self.loss)
            out = part if out is None else add(out, part)
            grads = slope if grads is None else add(grads, slope)
        assert out is not None and grads is not None
        count = mx.maximum(out.count, 1.0)
        grads, norm = optim.clip(tree_map(lambda g: g / count.astype(g.dtype), grads), self.settings.max_grad_norm)
        row = {"step": number, "loss": (out.total / count).item(), "grad_norm": norm.item()}
        self.refuse_nonsense(row, windows)
        rate = optim.learning_rate(self.settings, self.peak_rate, number, self.steps)
        first = self.proof() if number == 1 else None
        optim.set_learning_rate(self.optimizer, rate)
        self.optimizer.update(self.policy.model, grads)
        mx.eval(self.policy.model.trainable_parameters(), self.optimizer.state)
        adapter.set_dropout_key(self.policy.model, None)
        if first:
            self.prove_learning(*first)
        self.done = number
        took = time.perf_counter() - started
        return row | {
            "learning_rate": rate,
            **averages(out),
            "num_tokens": self.tokens,
            "tokens_per_second": sum(map(tokens_of, windows)) / took,
            "step_s": took,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "epoch": min(number * self.settings.gradient_accumulation, self.micro) / self.per_epoch,
        }

    def evaluate(self) -> dict[str, Any]:
        """Loss and metrics over the held-out rows, no gradient, no dropout."""
        assert self.held_out is not None
        s, total = self.settings, None
        cuts = data.plan(
            self.held_out, batch_size=s.batch_size, batch_tokens=s.batch_tokens, seed=0, epoch=0, shuffle=False
        )
        for rows in cuts:
            out = self.policy.losses(self.collate([self.held_out[int(i)] for i in rows]).batch, self.loss)
            total = out if total is None else add(total, out)
        assert total is not None
        loss = (total.total / mx.maximum(total.count, 1.0)).item()
        return {"step": self.done, "eval_loss": loss} | {f"eval_{k}": v for k, v in averages(total).items()}

    def worse_for_too_long(self, row: dict[str, Any]) -> bool:
        """Keep the best evaluation's weights; True when --early-stop evaluations brought nothing better."""
        if self.best is None or row["eval_loss"] < self.best[0]:
            self.best, self.waited = (row["eval_loss"], self.done), 0
            checkpoint.save(self.folder.checkpoints / "best", self.policy.model, self.optimizer, self.state())
            return False
        self.waited += 1
        return self.settings.early_stop is not None and self.waited >= self.settings.early_stop

    def finish(self) -> None:
        """Write the adapter: the best one where evaluations chose, else the last."""
        if self.settings.early_stop and self.best:
            checkpoint.restore(self.folder.checkpoints / "best", self.policy.model, self.optimizer)
            self.reporter.say(
                f"best evaluation was at step {self.best[1]}: loss {self.best[0]:.4f}; that one is written"
            )
        self.folder.write_weights(self.policy)
        self.reporter.say(f"written to {self.folder.root}")

    # ------------------------------------------------------------------ going on and stopping

    def state(self) -> dict[str, Any]:
        """What a checkpoint says beside weights and optimizer."""
        position = {"step": self.done, "tokens": self.tokens, "best": self.best, "waited": self.waited}
        return position | {"norms": self.norms[-100:], "run": self.folder.identity(self.rows.fingerprint)}

    def save(self) -> None:
        """A checkpoint at this step; older ones go."""
        root = self.folder.checkpoints
        checkpoint.save(root / f"step-{self.done:06d}", self.policy.model, self.optimizer, self.state())
        checkpoint.prune(root, self.settings.keep)

    def resume(self) -> None:
        """Back to the newest checkpoint when asked to; refuses one of other data or settings, naming them."""
        found = checkpoint.newest(self.folder.checkpoints) if self.settings.resume else None
        if found is None:
            return
        state = checkpoint.read_state(found)
        self.folder.refuse_difference(state["run"], self.rows.fingerprint)
        checkpoint.restore(found, self.policy.model, self.optimizer)
        self.done, self.tokens, self.norms, self.waited = (state[k] for k in ("step", "tokens", "norms", "waited"))
        self.best = tuple(state["best"]) if state["best"] else None
        self.folder.cut_metrics(self.done)
        self.reporter.say(f"going on after step {self.done} of {self.steps}")

    def refuse_nonsense(self, row: dict[str, Any], windows: list[list[Example]]) -> None:
        """Stop before a NaN or an exploding gradient reaches the weights."""
        norm = row["grad_norm"]
        bad = next((name for name in ("loss", "grad_norm") if not math.isfinite(row[name])), None)
        if bad is None and len(self.norms) >= 10 and norm > EXPLODED * max(statistics.median(self.norms), 1e-3):
            bad = "grad_norm"
        if bad:
            lines = ", ".join(str(example.line) for examples in windows for example in examples)
            raise Fault(
                f"step {row['step']}: {bad} is {row[bad]:.4g} (rows at lines {lines}); the weights are those of step "
                f"{self.done}, the newest checkpoint is {checkpoint.newest(self.folder.checkpoints) or 'none'}. "
                "Look at these rows, or lower --learning-rate"
            )
        self.norms = [*self.norms[-99:], norm]

    def proof(self) -> tuple[dict[str, mx.array], str]:
        """What the first step must change, and what it must not."""
        return dict(tree_flatten(self.policy.model.trainable_parameters())), frozen_hash(self.policy.model)

    def prove_learning(self, before: dict[str, mx.array], frozen: str) -> None:
        """After the first optimizer step: trained weights moved, frozen ones did not; else it stops."""
        after = dict(tree_flatten(self.policy.model.trainable_parameters()))
        if all(mx.array_equal(before[name], after[name]).item() for name in before):
            raise Fault(
                "the first optimizer step changed no weight: the gradient is zero (are chosen and rejected equal?)"
            )
        if frozen_hash(self.policy.model) != frozen:
            raise Fault("the first optimizer step changed frozen weights")

    def fill_reference(self) -> None:
        """With full fine-tuning the reference is gone after step 1: all its numbers are computed before."""
        for dataset in filter(None, (self.rows, self.held_out)):
            s = self.settings
            for rows in data.plan(dataset, batch_size=s.batch_size, batch_tokens=s.batch_tokens, seed=0, epoch=0):
                self.collate([dataset[int(i)] for i in rows])

    def dropout_key(self, step: int) -> mx.array | None:
        """A function of seed and step, so a resumed run draws the same masks."""
        s = self.settings
        return mx.random.split(mx.random.key(s.seed), self.steps + 1)[step] if s.lora_dropout else None

    def facts(self) -> dict[str, Any]:
        """What the run is about to do, in numbers."""
        report, policy = self.rows.report, self.policy
        return {
            "model": f"{policy.name} ({policy.parameters / 1e6:.1f}M parameters, {policy.dtype})",
            "trained_parameters": policy.trained,
            "trained_share": round(policy.trained / policy.parameters, 6),
            "rows": len(self.rows),
            "tokens": report["tokens"],
            "trained_tokens": report["trained_tokens"],
            "eval_rows": len(self.held_out) if self.held_out else 0,
            "micro_batches_per_epoch": self.per_epoch,
            "steps": self.steps,
            "learning_rate": self.peak_rate,
            "data_fingerprint": self.rows.fingerprint,
        }


def add(a: Any, b: Any) -> Any:
    """Element-wise sum of equal trees, evaluated so that graphs of micro-batches do not pile up."""
    total = tree_map(lambda x, y: x + y, a, b)
    mx.eval(total)
    return total


def averages(out: LossOutput) -> dict[str, float]:
    """Metrics of a window: sums over counts."""
    return {name: (total / mx.maximum(count, 1.0)).item() for name, (total, count) in out.metrics.items()}


def tokens_of(examples: list[Example]) -> int:
    """Tokens the model reads for these rows, each prompt once."""
    return sum(len(e.prompt) + sum(len(c.tokens) for c in e.completions) for e in examples)


@contextmanager
def interruptible() -> Iterator[Any]:
    """Inside, the first Ctrl-C only sets a mark (the yielded function tells); the second one ends at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller's own business
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    from .cli import run as run_command

    raise SystemExit(run_command(main))
