# SPDX-License-Identifier: Apache-2.0
"""Steering without a hook, for programs that know nothing of it: weights that stock mlx-lm loads, or a GGUF file.

    mlx-realign steer export --steer mood.safetensors --to mlx-lm --output grey-model
    mlx-realign steer export --steer mood.safetensors:2.5 --to gguf --output mood.gguf

mlx-lm: a vector that is added behind a block is a bias of the last layer the block adds to the stream, so the folder is
the model with that bias; its weights are linked, quantised ones stay as they are. A vector at block -1 is a rank-1
adapter on the embeddings. What depends on the state, the place in the text or the prompt cannot be a weight, and is
refused in one line; `ablate` at all blocks has a relative that can, an adapter that keeps layers from writing along the
direction. Every export is run and held against the steered model before it is called done.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from .. import distributions, files, gguf_vectors, noise, vectors
from ..errors import UserError
from ..policy import Policy
from ..vectors import About, Direction
from .apply import steer
from .asked import SteerFlags, UseFlags, load_model, steers_of
from .baked import Baked, ablation_adapter, bias_folder, embedding_adapter
from .spec import Steer

NEAR = 0.5  # share of what the steering changes, by which an adapter that ablates may differ from it
TOLERANCE = 0.02  # largest difference of a log-prob, as a share of what the steering changes, beside rounding
ROUNDING = {mx.float32: 1e-3, mx.bfloat16: 0.2, mx.float16: 0.05}  # nats


@dataclass(frozen=True, kw_only=True)
class Settings(UseFlags, SteerFlags):
    """What `steer export` can be told."""

    to: Literal["mlx-lm", "gguf"]
    """mlx-lm: a folder for mlx_lm.generate; gguf: a control vector for llama.cpp."""
    output: str
    """New folder, or for gguf a file that ends in .gguf."""
    copy: bool = False
    """mlx-lm: copy the model's weights instead of linking them."""


def command(settings: Settings) -> int:
    """`mlx-realign steer export`; returns 0."""
    if not settings.steer:
        raise UserError("--steer is needed: the file of a direction, such as mood.safetensors or mood.safetensors:2.5.")
    output = Path(settings.output)
    if output.exists() and not (settings.to == "mlx-lm" and output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists already. Give a new one.")
    if settings.to == "gguf" and output.suffix != ".gguf":
        raise UserError(f"--output {output}: a control vector is kept in a file that ends in .gguf.")
    if settings.to == "mlx-lm" and settings.adapter:
        raise UserError(
            "--adapter: the folder would lack it. Fuse it into a model first: mlx-realign export --to fused."
        )
    policy = load_model(settings, *settings.steer)
    steers = steers_of(settings, policy, force=settings.force)
    for line in export(policy, steers, settings):
        print(line)
    return 0


def export(policy: Policy, steers: Sequence[Steer], settings: Settings) -> list[str]:
    """Write what `settings` ask for; returns what to tell the user. UserError where it cannot be said in weights."""
    ablated = settings.to == "mlx-lm" and [one.operator for one in steers] == ["ablate"]
    added = {} if ablated else added_by(steers)
    if not ablated and not any(vector.any() for vector in added.values()):
        raise UserError("there is nothing to export: with a coefficient of 0 the steered model is the model.")
    base = log_probs(policy)
    with steer(policy, *steers):
        expected = log_probs(policy)
    effect = float(mx.abs(expected - base).max())
    output = Path(settings.output)
    if settings.to == "gguf":
        with files.new_path(output) as draft:
            kept = gguf(policy, steers, added, draft)
            with told_as(output), steer(policy, vectors.load(draft, policy=policy)):
                told = verified(policy, expected, effect)
        blocks = vectors.spans(kept)
        return [f"wrote {output}: blocks {blocks}", told, f"run it: llama-cli -m MODEL.gguf --control-vector {output}"]
    with files.new_folder(output) as draft:
        baked = written(policy, steers, added, draft, settings)
        with told_as(output):
            if ablated:
                steered, expected = expected, log_probs(policy)
                baked.told.append(relative(float(mx.abs(expected - steered).max()), effect, force=settings.force))
            kept = ("dtype", "quantize", "cpu_dequantize", "trust_remote_code")
            options = {name: getattr(settings, name) for name in kept}
            loaded = Policy.load(str(baked.model), adapter=baked.adapter and str(baked.adapter), **options)
            baked.told.append(verified(loaded, expected, effect))
    first, *rest = baked.told
    model, adapter = (output if place == draft else place for place in (baked.model, baked.adapter))
    return [f"wrote {output}: {first}", *rest, f"run it: {run_line(model, adapter)}"]


def written(
    policy: Policy, steers: Sequence[Steer], added: dict[int, np.ndarray], folder: Path, settings: Settings
) -> Baked:
    """Weights that do what the steers do, for stock mlx-lm. UserError where none can."""
    if not added:
        return ablation_adapter(policy, steers[0], folder)
    if list(added) == [-1]:
        return embedding_adapter(policy, added[-1], folder)
    if -1 in added:
        raise UserError(
            "--to mlx-lm: block -1 is said by an adapter and the others by biases, which are not made together. "
            "Name the blocks with --blocks, and export twice."
        )
    return bias_folder(policy, added, folder, trust_remote_code=settings.trust_remote_code, copy=settings.copy)


def relative(gap: float, effect: float, *, force: bool) -> str:
    """What to say of an adapter that ablates. UserError where it is something else than the steering."""
    told = (
        "not the same operation: what embeddings bring along the direction stays, and layers of a block no longer see "
        f"it; largest difference of a log-prob from the steered model's {gap:.2g} nats, where steering moves them by "
        f"{effect:.2g}. `mlx-realign ablate` makes such an adapter with its strength fitted and its effect measured"
    )
    if gap > NEAR * effect and not force:
        raise UserError(f"an adapter that ablates is {told}; --force writes it all the same.")
    return told


def added_by(steers: Sequence[Steer]) -> dict[int, np.ndarray]:
    """Block -> float64 [d] that is added there in all, blocks in order. UserError for what is more than adding."""
    found: dict[int, np.ndarray] = {}
    for one in steers:
        if reason := why_not(one):
            raise UserError(f"this cannot be exported: {reason}. `mlx-realign steer generate` runs it.")
        for block in one.at:
            vector = one.coefficient * one.numbers(block)["vector"][0].astype(np.float64)
            found[block] = found.get(block, 0) + vector
    return {block: found[block] for block in sorted(found)}


def why_not(one: Steer) -> str | None:
    """Why a steer is no constant that is added to every token, or None."""
    if one.operator != "add":
        what = "to be ablated from weights it goes to `mlx-realign ablate`" if one.operator == "ablate" else ""
        reason = (
            f"what {one.operator} does depends on the state of each token, and weights that stock programs run do not"
        )
        return f"{reason}; {what}" if what else reason
    if one.positions != "all":
        return f"it acts on positions {one.positions}, and a weight acts on every token (--positions all does too)"
    if one.schedule.kind != "constant":
        return f"its schedule is {one.schedule.kind}, and weights do not change while a text is made"
    if one.condition is not None:
        return "it has a condition, and weights act on every prompt"
    return None


def gguf(policy: Policy, steers: Sequence[Steer], added: dict[int, np.ndarray], output: Path) -> list[int]:
    """Write a control vector; returns its blocks."""
    from_ = steers[0].direction.about if len(steers) == 1 else About(method="sum")
    about = dataclasses.replace(
        from_,
        operator="add",
        positions="all",
        coefficient=1.0,
        strength_unit="residual",
        blocks=tuple(added),
        base_model=policy.name,
        base_hash=policy.base_hash,
    )
    return gguf_vectors.write(Direction(added, about), output, model_type=str(policy.config.get("model_type", "")))


@contextmanager
def told_as(output: Path) -> Iterator[None]:
    """What was written and cannot be loaded, or does something else, is told by the name that it would have got."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"--output {output}: what was written does not run as it should, and is gone again: {error}"
        ) from error


def verified(policy: Policy, expected: mx.array, effect: float) -> str:
    """What to say of an export that was run. UserError where it does not do what the steered model does."""
    gap = float(mx.abs(log_probs(policy) - expected).max())
    told = f"largest difference of a log-prob {gap:.1e} nats, where steering moves them by {effect:.2g}"
    if not gap <= TOLERANCE * effect + ROUNDING[noise.judged_as(policy.dtype)]:
        raise UserError(told)
    return f"verified on random tokens, loaded again, against the model in memory: {told}"


def log_probs(policy: Policy) -> mx.array:
    """float32 [2, 12, V] of random tokens: what models are compared by (logits may differ by a constant)."""
    tokens = mx.random.randint(0, policy.vocabulary, (2, 12), key=mx.random.key(0))
    found = distributions.log_probs(policy.model(tokens))
    mx.eval(found)
    return found


def run_line(model: Path | None, adapter: Path | None) -> str:
    """The command that generates with an export."""
    return f"mlx_lm.generate --model {model}{f' --adapter-path {adapter}' if adapter else ''} --prompt ..."
