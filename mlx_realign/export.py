# SPDX-License-Identifier: Apache-2.0
"""Take an adapter elsewhere: to PEFT (torch, vLLM), or into the weights of its model.

    mlx-realign export output --to peft --output peft-adapter
    mlx-realign export output --to fused --output model

`fused` writes a whole model folder and says what rounding the weights costs. A quantised base is refused, because
quantising it again can change the weights by more than the adapter does: --dequantize writes float weights instead.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from . import adapter, cli, files, flags, loading
from .adapter_files import PEFT_WEIGHTS, read_config, read_mlx
from .adapter_fuse import dequantise, fuse, quantised, save_model
from .adapter_layers import EMBEDDING
from .adapter_peft import last_part, to_peft
from .errors import UserError


@dataclass(frozen=True)
class Settings:
    """What `export` can be told."""

    adapter: str
    """Adapter folder: what training wrote, or any of mlx-lm's (for fused also PEFT's)."""
    to: Literal["peft", "fused"]
    """peft: a PEFT adapter folder; fused: a model folder with the adapter in its weights."""
    output: str
    """Folder to write; it must be new or empty."""
    model: str | None = None
    """Model folder or hub id, where the one named in the adapter is not at hand."""
    dequantize: bool = False
    """fused: write a quantised base as float weights."""
    force: bool = False
    """fused: quantise the sum again, although the rounding may cover the adapter."""
    trust_remote_code: bool = False
    """Let code in the model folder run."""


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    settings = flags.parse(Settings, argv, prog="mlx-realign export", doc=__doc__ or "", positional=("adapter",))
    with files.new_folder(Path(settings.output)) as folder:
        told = (export_peft if settings.to == "peft" else export_fused)(settings, folder)
    print(f"wrote {settings.output}: {told}")
    return 0


def export_peft(settings: Settings, output: Path) -> str:
    """Write the PEFT folder and say what is in it; the model is read only when an embedding may be adapted."""
    folder = Path(settings.adapter)
    if (folder / PEFT_WEIGHTS).exists():
        raise UserError(f"{folder}: is a PEFT folder already.")
    paths = read_mlx(folder).modules()
    outside = [path for path in paths if not re.search(r"\.\d+\.", path) and last_part(path) != "lm_head"]
    embeddings = {}
    if outside:
        model, _ = loading.load_base(loading.find_model(base_name(settings)), settings.trust_remote_code)
        modules, tied = dict(model.named_modules()), adapter.tied_head(model)
        embeddings = {path: tied for path in outside if isinstance(modules.get(path), EMBEDDING)}
    to_peft(folder, output, base_name(settings), embeddings)
    return f"{len(paths)} layers, for PEFT's PeftModel.from_pretrained"


def export_fused(settings: Settings, output: Path) -> str:
    """Write the fused model and say how far it is from base + adapter. UserError for a quantised base (see above)."""
    source = loading.find_model(base_name(settings))
    model, config = loading.load_base(source, settings.trust_remote_code)
    if settings.dequantize:
        dequantise(model, config)
    adapter.load(model, Path(settings.adapter))
    again = quantised(model)
    expected = probe(model)
    rounding = fuse(model)
    if again and not settings.force:
        raise UserError(
            f"{source}: is quantised, and quantising the sum again would move the weights by {rounding:.0%} of what "
            "the adapter moves them. --dequantize writes float weights instead; --force quantises anyway."
        )
    difference = mx.abs(probe(model) - expected).max().item()
    save_model(model, config, source, output)
    return (
        f"rounding is {100 * rounding:.2g}% of the adapter, "
        f"largest difference of a log-prob on random tokens {difference:.1e} nats"
    )


def probe(model: nn.Module) -> mx.array:
    """float32 log-probs of a few random tokens: what the model before and after fusing is compared by."""
    vocabulary = next(layer.weight.shape[0] for _, layer in model.named_modules() if isinstance(layer, EMBEDDING))
    tokens = mx.random.randint(0, vocabulary, (1, 8), key=mx.random.key(0))
    logits = model(tokens).astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logps)
    return logps


def base_name(settings: Settings) -> str:
    """The model the adapter belongs to: --model, or what the adapter's configuration names."""
    config = read_config(Path(settings.adapter))
    name = settings.model or config.get("model") or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{settings.adapter}: does not say which model it is for. Give --model.")
    return str(name)


if __name__ == "__main__":
    sys.exit(cli.run(main))
