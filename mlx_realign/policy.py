# SPDX-License-Identifier: Apache-2.0
"""THE model wrapper: one policy serves training, reference, evaluation and generation, and holds the weights once.

`scores` is the only forward pass of the project: prompts computed once and shared where the model allows it, the head
in chunks at trained positions only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from . import adapter, balance, blas, compiled, fingerprint, forward, loading, manners, owners, packing, reach
from .batch import Batch, LossOutput, Scores
from .config import TrainSettings
from .head import Body
from .kernels import install, token_scores
from .workers import Workers, cores, known_thread

CLOSED = "the policy is closed, and mlx-lm's own attention runs"
SMALL = 20e6  # parameters; the matrices of a smaller model are multiplied three times faster by one thread than by two
Loss = Callable[[Scores, Batch], LossOutput]


class Policy:
    """A causal language model with an optional adapter. Build one with `Policy.load`.

    A model serves one policy at a time: UserError where another that is not closed has it.
    """

    def __init__(self, loaded: loading.Loaded, name: str) -> None:
        self.model, self.tokenizer, self.config, self.folder, self.notes, self.quantized = loaded
        self.name = name
        self.workers = Workers(cores() if loading.on_cpu() else 1)
        self.compiled = False
        self.needs: frozenset[str] = frozenset()
        self.router_aux_loss_coef = 0.0  # of the load-balancing loss; `refresh` makes a change of it count
        self.temperature = 1.0  # logits are divided by it wherever log-probs are taken
        self.packing = False  # whether rows of exact batches that share nothing are packed
        self.tried: dict[str, str | None] = {}  # ways of generating: what is wrong with each, None if nothing; see ways
        self.start: dict[str, mx.array] = {}
        self._starts_at_base: bool | None = None
        self.exact = not loading.on_cpu()  # whether a run lays its rows out without masks and padding before prompts
        owners.refuse_second(self.model)
        with loading.one_line(name, self.config):
            self.sharing, self.even = self.shares()
            self.stateful = forward.stateful(self.model) or forward.several(self.model)  # its caches are mlx-lm's own
            self.model.freeze()
            self.kernels = install(self.model)
        self.notes += self.kernels.notes
        if loading.on_cpu() and blas.in_use().wanting and (line := blas.in_use().line()):
            self.notes.append(line)
            blas.warn()
        owners.alive.add(self)
        blas.set_usual_threads(cores() if any(one.parameters >= SMALL for one in owners.alive) else 1)
        self.refresh()
        with loading.one_line(name, self.config):
            self.reach = reach.find(self.model, self.config, self.vocabulary)

    def shares(self) -> tuple[bool, bool]:
        """Whether prompts are shared, and whether only those of one length, as this model can have no padding."""
        even = forward.shareable(self.model, padded=True) is not None
        return not even or forward.shareable(self.model, padded=False) is None, even

    def close(self) -> None:
        """Give the model's modules back mlx-lm's own functions; the policy goes on working, by those. Twice is once."""
        self.kernels.close()
        self.tried = {"grouped": CLOSED}  # it goes through our attention; the other ways took our kernels
        if self.compiled:
            self.compile()  # traces hold what they were made with

    def __enter__(self) -> "Policy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        adapter: str | None = None,
        dtype: str = "auto",
        quantize: int | None = None,
        cpu_dequantize: str = "auto",
        trust_remote_code: bool = False,
    ) -> "Policy":
        """Model folder, hub id or `tiny-chat`, frozen; with `adapter` (mlx-lm or PEFT folder) attached and trainable.

        Raises UserError with one line for a model or adapter that cannot be found or read.
        """
        options = {"dtype": dtype, "quantize": quantize, "cpu_dequantize": cpu_dequantize}
        policy = cls(loading.load(model, trust_remote_code=trust_remote_code, **options), model)
        if adapter:
            policy.load_adapter(adapter)
        return policy

    @classmethod
    def from_settings(cls, settings: TrainSettings) -> "Policy":
        """As a training run asks: adapter attached (or all weights free), checkpointing, limits."""
        manners.limit_memory(settings.memory_limit, settings.wired_limit)
        options = {k: getattr(settings, k) for k in ("dtype", "quantize", "cpu_dequantize", "trust_remote_code")}
        policy = cls.load(settings.model, **options)
        policy.notes += manners.hints()
        policy.prepare(settings)
        return policy

    def prepare(self, settings: TrainSettings) -> None:
        """Make the wanted parameters trainable; the state this leaves is the reference of the stage."""
        self.router_aux_loss_coef = settings.router_aux_loss_coef
        if settings.full:
            self.model.unfreeze()
        elif settings.adapter:
            adapter.load(self.model, Path(settings.adapter))
        elif not adapter.adapters_of(self.model):
            adapter.attach(
                self.model,
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
                targets=settings.lora_targets,
                layers=settings.lora_layers,
                dora=settings.dora,
                rslora=settings.rslora,
                seed=settings.seed,
            )
        if settings.grad_checkpoint:
            forward.checkpoint_layers(self.model)
            blas.keep_freed_memory(sparing=True)
        if settings.compile == "on" or (settings.compile == "auto" and not loading.on_cpu()):
            self.compile()
        self.refresh()
        self.mark_start()

    def load_adapter(self, folder: str) -> None:
        """Attach the adapter of an mlx-lm or PEFT folder."""
        adapter.load(self.model, Path(folder))
        self.refresh()
        self.mark_start()

    def refresh(self) -> None:
        """Find the head again: it must be called after modules were exchanged. UserError where the model cannot run."""
        with loading.one_line(self.name, self.config):  # the first time the model runs
            self.body = Body(self.model)
        coefficient = self.router_aux_loss_coef
        self.balance = balance.find(self.model, self.config, coefficient) if coefficient else None
        if self.balance and self.workers.count > 1:  # balance is a matter of the whole batch
            self.workers = Workers(1)

    def mark_start(self) -> None:
        """What the policy is now becomes what `reference("init")` answers with; only adapter tensors are kept."""
        self.start = adapter.state(self.model)
        self._starts_at_base = None

    # ------------------------------------------------------------------ forward

    def scores(self, batch: Batch, *, gradient: bool = False) -> Scores:
        """Log-probs, entropy and top-1 hits of every trained completion token: float32 [R, Lc], 0 where masked.

        gradient: True where one will be asked for; the head's share of it is made in this same pass.
        """
        known_thread()
        states = self.states(batch)
        rows, width, size = states.completion.shape
        picked = states.completion.reshape(-1, size)[batch.positions]
        targets = batch.completion.reshape(-1)[batch.positions]
        if "prompt_logps" in self.needs:
            picked = mx.concatenate([picked, states.prompt.reshape(-1, size)])
            targets = mx.concatenate([targets, batch.prompt[:, 1:].reshape(-1)])
            if batch.lead is not None:  # what of the prompts stands in front of their rows: in the first row of each
                first = forward.first_rows(batch)
                picked = mx.concatenate([picked, states.completion[first].reshape(-1, size)])
                targets = mx.concatenate([targets, batch.completion[first].reshape(-1)])
        head, squares = self.body.head(), "log_sum_sq" in self.needs
        if self.temperature != 1 and head.rows is not None:
            picked = picked / self.temperature
        elif self.temperature != 1:
            head = head._replace(logits=lambda h, logits=head.logits: logits(h) / self.temperature)
        found = token_scores.fused(head, picked, targets, gradient=gradient, squares=squares)
        count = batch.positions.size
        trained = batch.mask.reshape(-1)[batch.positions]
        empty = mx.zeros((rows * width,))

        def place(x: mx.array) -> mx.array:
            return empty.at[batch.positions].add(mx.where(trained, x[:count], 0)).reshape(rows, width)

        scores = Scores(place(found.logps), place(found.entropy), place(found.correct))
        if "log_sum_sq" in self.needs:
            scores = scores._replace(log_sum_sq=place(found.log_sum_sq))
        if "prompt_logps" in self.needs:
            real, rest = mx.arange(batch.prompt.shape[1] - 1)[None] >= batch.pad[:, None], found.logps[count:]
            parts = [mx.where(real, rest[: real.size].reshape(real.shape), 0)]
            if batch.lead is not None:
                real = mx.arange(width)[None] < batch.lead[:, None]
                parts.append(mx.where(real, rest[-real.size :].reshape(real.shape), 0))
            scores = scores._replace(prompt_logps=mx.concatenate(parts, 1))
        return scores

    def states(self, batch: Batch) -> forward.States:
        """Hidden states by the fastest way that is right for this model."""
        shared = forward.even if self.even else forward.shared
        return (shared if self.sharing else forward.plain)(self.model, self.body.hidden, batch)

    @property
    def groups_rows(self) -> bool | None:
        """Whether attention reads a prompt once for all rows that are generated from it; None: not found out yet."""
        return self.sharing and self.tried["grouped"] is None if "grouped" in self.tried else None

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.body.vocabulary

    # ------------------------------------------------------------------ gradient

    def gradients(self, batch: Batch, loss: Loss, *, wait: bool = True) -> tuple[LossOutput, dict[str, Any]]:
        """Sums of the loss and the gradient of `total` with respect to the trainable parameters, evaluated.

        wait: False where a single worker need not have computed them yet when this returns.
        """
        return _sum(self._map(batch, lambda part: self._gradients(part, loss), wait=wait))

    def losses(self, batch: Batch, loss: Loss) -> LossOutput:
        """Sums of the loss without a gradient, evaluated."""
        return _sum(self._map(batch, lambda part: self._loss(part, loss)))

    def totals(self, batch: Batch) -> mx.array:
        """float32 [R]: log-prob of every completion, summed over its trained tokens, evaluated."""
        return mx.concatenate(self._map(batch, lambda part: self.scores(part).logps.sum(-1)))

    def token_logps(self, batch: Batch) -> mx.array:
        """float32 [R, Lc]: log-prob of every trained completion token, 0 elsewhere, evaluated."""
        width = batch.mask.shape[1]  # parts leave out columns that none of their rows uses
        parts = self._map(batch, lambda part: self.scores(part).logps)
        return mx.concatenate([mx.pad(part, [(0, 0), (0, width - part.shape[1])]) for part in parts])

    def _map(self, batch: Batch, build: Callable[[Batch], Any], *, wait: bool = True) -> list[Any]:
        self.reach.refuse_arrays("batch", (batch.prompt, batch.completion), self.tokenizer)
        if self.workers.pool:
            mx.eval(self.model.state)  # what is pending belongs to this thread: workers could not evaluate it
        packed = (lambda part: build(packing.pack(part))) if self.packing else build
        return self.workers.map(batch, packed, wait=wait)

    def _loss(self, batch: Batch, loss: Loss, *, gradient: bool = False) -> LossOutput:
        """The method's loss, and the load-balancing loss where it is asked for."""
        if self.balance is None:
            return loss(self.scores(batch, gradient=gradient), batch)
        with balance.listening() as heard:
            out = loss(self.scores(batch, gradient=gradient), batch)
        return self.balance.add(out, heard, forward.token_weights(batch, self.sharing, self.even))

    def prepare_for(self, needs: frozenset[str], temperature: float = 1.0) -> None:
        """What a method's loss needs beside log-probs (methods.needs), and the temperature they are taken at."""
        changed = (needs, temperature) != (self.needs, self.temperature)
        self.needs, self.temperature = needs, temperature
        if self.compiled and changed:
            self.compile()  # traces hold them
        whole = "whole_batch" in needs or self.balance is not None or self.compiled or not loading.on_cpu()
        count = 1 if whole else cores()
        if count != self.workers.count:
            self.workers = Workers(count)

    def compile(self) -> None:
        """Compile the gradient: one trace per loss and shape (pad to `width`). For GPUs; a CPU then uses one worker."""
        self._traced = compiled.Gradient(self.model, self.differentiate)
        self.compiled, self.workers = True, Workers(1)

    def _gradients(self, batch: Batch, loss: Loss) -> tuple[LossOutput, dict[str, Any]]:
        exact = batch.prompt_pad is None
        if self.compiled and batch.planned and (exact or not self.even):  # a trace cannot know which lengths are equal
            try:
                return self._traced(batch, loss)
            except compiled.LooksAtNumbers:
                self.compiled = False
                self.notes.append(compiled.NOTE)
        return self.differentiate(batch, loss)

    def differentiate(self, batch: Batch, loss: Loss) -> tuple[LossOutput, dict[str, Any]]:
        """As `gradients`, in one piece and not evaluated."""

        def objective(parameters: dict[str, Any]) -> tuple[mx.array, mx.array, dict[str, Any]]:
            self.model.update(parameters)
            out = self._loss(batch, loss, gradient=True)
            return out.total, out.count, out.metrics

        trainable = self.model.trainable_parameters()
        try:
            (total, count, metrics), grads = mx.value_and_grad(objective)(trainable)
        finally:
            self.model.update(trainable)  # tracers must not stay behind in the model
        return LossOutput(total, count, metrics), grads

    # ------------------------------------------------------------------ reference

    @contextmanager
    def reference(self, kind: str = "init") -> Iterator[None]:
        """Inside, the policy answers as it was when the stage began ("init"), without its adapter ("base"), or as it is
        ("now").

        Adapter tensors are exchanged for those of the start; with full fine-tuning it must be used before step 1.
        """
        if kind == "now":
            yield
            return
        now = adapter.state(self.model)
        bare = kind == "base" or self.starts_at_base
        with self.adapter_off() if bare else nullcontext():
            if not bare:
                self.model.load_weights(list(self.start.items()), strict=False)
            try:
                yield
            finally:
                self.model.load_weights(list(now.items()), strict=False)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the policy is its base model."""
        adapter.set_enabled(self.model, False)
        try:
            yield
        finally:
            adapter.set_enabled(self.model, True)

    @property
    def starts_at_base(self) -> bool:
        """Whether the stage began with adapters that change nothing: every B zero, no DoRA magnitudes."""
        if self._starts_at_base is None:
            b = [mx.any(v) for k, v in self.start.items() if k.endswith("lora_b")]
            magnitudes = any(k.endswith(".m") for k in self.start)
            self._starts_at_base = not magnitudes and not (b and mx.any(mx.stack(b)).item())
        return self._starts_at_base

    # ------------------------------------------------------------------ facts

    @cached_property
    def base_hash(self) -> str:
        """Of the weights without an adapter: as stored, where they were read from a folder, so alike at any dtype."""
        return fingerprint.stored(self.folder, self.quantized) or fingerprint.base(self.model)

    @property
    def traces(self) -> int:
        """Number of compiled gradients: one for each loss and each set of shapes; 0 where steps are not compiled."""
        return self._traced.count if self.compiled else 0

    @property
    def dtype(self) -> mx.Dtype:
        """Of the residual stream."""
        tensors: list[mx.array] = [value for _, value in tree_flatten(self.model.parameters())]  # pyright: ignore
        return next(x.dtype for x in tensors if mx.issubdtype(x.dtype, mx.floating))

    def width(self, n: int) -> int:
        """The next of few widths (a quarter of a power of two apart), so that a compiled step has few shapes."""
        step = max(16, 1 << max(0, n.bit_length() - 3))
        return -(-n // step) * step

    @property
    def trained(self) -> int:
        """Number of trainable parameters."""
        tensors: list[mx.array] = [value for _, value in tree_flatten(self.model.trainable_parameters())]  # pyright: ignore
        return sum(x.size for x in tensors)

    @property
    def parameters(self) -> int:
        """Number of parameters, packed ones counted as what they stand for."""
        from mlx_lm.utils import get_total_parameters

        return get_total_parameters(self.model)


def _sum(results: list[Any]) -> Any:
    """Element-wise sum of equal trees."""
    return results[0] if len(results) == 1 else tree_map(lambda *parts: sum(parts[1:], parts[0]), *results)
