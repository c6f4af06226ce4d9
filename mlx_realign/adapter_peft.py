# SPDX-License-Identifier: Apache-2.0
"""PEFT adapter folders (`adapter_model.safetensors`) to and from mlx-lm's layout.

mlx-lm keeps one rank and one scale for the whole adapter; PEFT may give each layer its own. Smaller ranks are padded
with zeros (which stay zero in training) and each layer's own scale is folded into its B: the product is the same.
"""

import re
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .adapter_files import CONFIG, PEFT_WEIGHTS, AdapterFile, number, read_config, read_mlx, read_tensors, write_folder
from .adapter_layers import EMBEDDING, SWITCH, dense_weight
from .adapter_patterns import first_match
from .errors import UserError

NAME = re.compile(
    r"base_model\.model\.(?P<path>.+?)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.default)?(?:\.weight)?"
)
COPY = re.compile(r"base_model\.model\.(?P<path>.+?)(?:\.base_layer)?\.weight")  # PEFT saves them with embeddings
EXPERT = re.compile(r"(?P<home>.+)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)")
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names of its experts' layers
# What these add is not a low-rank pair on a frozen base, so dropping them would give another model without a word.
UNSUPPORTED = (
    *("modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
)
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # the others change the base as well


class Piece(NamedTuple):
    """The pair of one layer, or of one expert of a layer, its own scale already in b."""

    path: str  # in the model, mlx-lm's name
    expert: int | None
    a: mx.array  # float32 [in, r]
    b: mx.array  # float32 [r, out]
    m: mx.array | None  # float32 [out], DoRA


def read_peft(folder: Path, bases: dict[str, Any], tied: bool, most: int | None = None) -> AdapterFile:
    """Read a PEFT LoRA folder for a model whose layers are `bases` (path -> layer); tied: the head is the embedding.

    Raises UserError for what has no counterpart here, naming the key, or every tensor that does not fit.
    """
    config = read_config(folder)
    refuse_unsupported(folder, config)
    scale = scaling(folder, config, {}) or 1.0
    pairs, wrong = pairs_of(read_tensors(folder / PEFT_WEIGHTS, most), bases)
    own = {key: own_values(folder, config, name, list(pairs)) for key, name in PATTERNS.items()}
    pieces: list[Piece] = []
    for path, pair in pairs.items():
        try:
            told = {key: values[path] for key, values in own.items() if path in values}
            refuse_rank(path, pair, told.get("r") or number(folder, config, "r"))
            pieces += pieces_of(path, pair, bases, scaling(folder, config, told) / scale)
        except ValueError as error:
            wrong.append(f"{path}: {error}")
    if wrong:
        shown = "\n".join(f"  {line}" for line in wrong[:20])
        raise UserError(f"{folder}: this PEFT adapter does not fit the model. Give the model it was made for.\n{shown}")
    heads = [piece.path for piece in pieces if tied and isinstance(bases[piece.path], EMBEDDING)]
    if heads:
        raise UserError(
            f"{folder}: adapts {heads[0]}, which is also this model's head. PEFT adapts only the lookup, mlx-lm both: "
            "the result would differ. Train it again without the embedding."
        )
    tensors = assemble(pieces, bases)
    rank = max(piece.a.shape[1] for piece in pieces)
    dropout = number(folder, config, "lora_dropout") if "lora_dropout" in config else 0.0
    return AdapterFile(folder, tensors, rank, scale, dropout, bool(config.get("use_dora")), config)


def refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    """UserError for a PEFT configuration whose effect is more than a low-rank pair."""
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'.")
    missing = [key for key in ("r", "lora_alpha") if key not in config]
    if missing:
        raise UserError(f"{where}: lacks {', '.join(missing)}. Save the adapter with PEFT again.")
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(
            f"{where}: uses {', '.join(used)}, which mlx-lm's adapters cannot hold. "
            "Merge the adapter into its model with PEFT (merge_and_unload) and give that folder as --model."
        )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base weights. Save it "
            "with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA, and give that folder."
        )


def scaling(folder: Path, config: dict[str, Any], own: dict[str, float]) -> float:
    """alpha / r, or alpha / sqrt(r), of one layer; own: what it has of `r` and `lora_alpha` for itself."""
    said = {key: number(folder, config, key) for key in PATTERNS} | own
    if said["r"] < 1:
        raise UserError(f"{folder / CONFIG}: r is {said['r']:g}, expected 1 or more.")
    return said["lora_alpha"] / (sqrt(said["r"]) if config.get("use_rslora") else said["r"])


def own_values(folder: Path, config: dict[str, Any], name: str, paths: list[str]) -> dict[str, float]:
    """Path -> its own rank or alpha, by `rank_pattern` or `alpha_pattern` (name), which match the end of a path."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{folder / CONFIG}: {name} is no JSON object of patterns and numbers.")
    found = first_match(folder / CONFIG, name, patterns, paths) if patterns else {}
    return {path: number(folder, patterns, pattern) for path, pattern in found.items()}


def refuse_rank(path: str, pair: dict[str, mx.array], rank: float) -> None:
    """ValueError where the stored rank is not the configured one."""
    stored = next((v.shape[0] for k, v in pair.items() if k.endswith("_A") and v.ndim), None)
    if stored is not None and "experts" not in path.split(".")[-2:] and stored != rank:
        raise ValueError(f"rank {stored}, but {CONFIG} says {rank:g}")


def pairs_of(tensors: dict[str, mx.array], bases: dict[str, Any]) -> tuple[dict[str, dict[str, mx.array]], list[str]]:
    """PEFT path -> its arrays by kind, float32; and one line for each tensor that is no adapter tensor."""
    pairs: dict[str, dict[str, mx.array]] = {}
    wrong = []
    for name, tensor in tensors.items():
        match, copy = NAME.fullmatch(name), COPY.fullmatch(name)
        if match is None:
            wrong += differs(copy["path"] if copy else name, tensor, bases)
        elif not mx.issubdtype(tensor.dtype, mx.floating):
            wrong.append(f"{name}: {tensor.dtype}, expected floats")
        else:
            pairs.setdefault(match["path"], {})[match["kind"]] = tensor.astype(mx.float32)
    return pairs, wrong


def differs(path: str, weight: mx.array, bases: dict[str, Any]) -> list[str]:
    """One line unless the tensor is a copy of the model's own weight, which PEFT saves beside adapted embeddings."""
    try:
        base = bases[resolve(path, bases)]
    except ValueError:
        return [f"{path}: not a LoRA tensor"]
    own = dense_weight(base).astype(mx.float32)
    if weight.shape != own.shape:
        return [f"{path}: the base had a weight {weight.shape}, the model has {own.shape}"]
    rounding = (0.1 if "scales" in base else 0.01) * mx.abs(own).max()
    far = mx.abs(weight.astype(mx.float32) - own).max() > rounding
    return [f"{path}: the base had another weight than the model has"] if far else []


def pieces_of(path: str, pair: dict[str, mx.array], bases: dict[str, Any], factor: float) -> list[Piece]:
    """What the arrays of one PEFT path are in the model; ValueError says what is wrong with them."""
    kind = "embedding_" if "lora_embedding_A" in pair else ""
    missing = [name for name in (f"lora_{kind}A", f"lora_{kind}B") if name not in pair]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    a, b, m = pair[f"lora_{kind}A"], pair[f"lora_{kind}B"] * factor, pair.get("lora_magnitude_vector")
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"shapes {a.shape} and {b.shape}, expected two matrices")
    if path.endswith((".experts", ".experts.base_layer")):
        return fused_experts(path, a, b, bases)
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"shapes {a.shape} and {b.shape} have no rank in common")
    match = EXPERT.fullmatch(path)
    if not match or path in bases:
        return [Piece(resolve(path, bases), None, a.T, b.T, m)]
    home = expert_layer(match["home"], MIXTRAL.get(match["name"], match["name"]), bases)
    base, expert = bases[home], int(match["expert"])
    if expert >= base.num_experts or (a.shape[1], b.shape[0]) != (base.input_dims, base.output_dims):
        raise ValueError(f"the model has {base.num_experts} experts of {base.input_dims} to {base.output_dims}")
    return [Piece(home, expert, a.T, b.T, m)]


def fused_experts(path: str, a: mx.array, b: mx.array, bases: dict[str, Any]) -> list[Piece]:
    """The pair of a stacked parameter (PEFT's `target_parameters`): A [experts * r, in], B [out, r * experts].

    `experts.base_layer` is gate_up_proj, whose B has the rows of gate_proj, then up_proj's; `experts` is down_proj.
    """
    home, _, last = path.partition(".experts")
    names = ("gate_proj", "up_proj") if last else ("down_proj",)
    layers = [expert_layer(home, name, bases) for name in names]
    experts, outputs = bases[layers[0]].num_experts, bases[layers[0]].output_dims
    if a.shape[0] % experts or b.shape != (outputs * len(names), a.shape[0]):
        raise ValueError(f"shapes {a.shape} and {b.shape} are not those of {experts} experts")
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(names), outputs, -1, experts)
    return [
        Piece(layer, expert, a[expert].T, b[part, :, :, expert].T, None)
        for part, layer in enumerate(layers)
        for expert in range(experts)
    ]


def expert_layer(home: str, name: str, bases: dict[str, Any]) -> str:
    """Path of the stacked layer `name` of the mixture at `home`; ValueError where there is none.

    Only `switch_mlp`, where mlx-lm restacks separate experts: other mixtures order their rows in ways of their own.
    """
    path = tail(f"{home}.switch_mlp.{name}")
    found = [p for p, base in bases.items() if tail(p) == path and isinstance(base, SWITCH)]
    if len(found) != 1:
        raise ValueError("the model has no such layer")
    return found[0]


def resolve(path: str, bases: dict[str, Any]) -> str:
    """The model's path of a layer that Hugging Face calls `path`: the same, or the only one with the same end."""
    found = [path] if path in bases else [p for p in bases if tail(p) == tail(path)]
    if len(found) != 1:
        raise ValueError("the model has no such layer")
    return found[0]


def tail(path: str) -> str:
    """From the block on (`layers.0.mlp.up_proj`), or the last part: where wrappers' prefixes no longer matter."""
    match = re.search(r"(?:^|\.)(\w+\.\d+\..+)", path)
    return match[1] if match else last_part(path)


def assemble(pieces: list[Piece], bases: dict[str, Any]) -> dict[str, mx.array]:
    """Arrays by mlx-lm's names, all of the largest rank; experts without a pair get zeros."""
    rank = max(piece.a.shape[1] for piece in pieces)
    tensors: dict[str, mx.array] = {}
    experts: dict[str, dict[int, tuple[mx.array, mx.array]]] = {}
    for path, expert, a, b, m in pieces:
        a = mx.pad(a, [(0, 0), (0, rank - a.shape[1])])
        b = mx.pad(b, [(0, rank - b.shape[0]), (0, 0)])
        if expert is not None:
            experts.setdefault(path, {})[expert] = (a.T, b.T)
            continue
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = a, b
        if m is not None:
            tensors[f"{path}.m"] = m
    for path, found in experts.items():
        base = bases[path]
        none = mx.zeros((rank, base.input_dims)), mx.zeros((base.output_dims, rank))
        both = zip(*(found.get(i, none) for i in range(base.num_experts)), strict=True)
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = (mx.stack(list(side)) for side in both)
    return tensors


def to_peft(
    folder_in: str | Path, folder_out: str | Path, base_model: str, embeddings: dict[str, bool] | None = None
) -> None:
    """Write the mlx-lm adapter in `folder_in` as a PEFT folder for the Hugging Face model `base_model`.

    embeddings: paths of adapted embeddings, each with whether the head shares it (then the head gets the same pair, for
    PEFT adapts the two apart). Experts are written one by one; PEFT stacks them again for the models it knows to.
    Raises UserError for a folder that cannot be read and for expert layers that have no names of their own.
    """
    file, embeddings = read_mlx(Path(folder_in)), embeddings or {}
    tensors: dict[str, mx.array] = {}
    targets: set[str] = set()
    keys = file.config["lora_parameters"].get("keys") or ()
    everywhere = file.config.get("num_layers", -1) <= 0  # the names inside a block then say it all
    for path, pair in file.modules().items():
        a, b = pair["lora_a"].astype(mx.float32), pair["lora_b"].astype(mx.float32)
        inside = re.fullmatch(r".*?\.\d+\.(.+)", path)
        target = inside[1] if inside and everywhere and path not in keys else path
        if path in embeddings:
            tensors[f"{path}.lora_embedding_A"], tensors[f"{path}.lora_embedding_B"] = a.T, b.T
            if embeddings[path]:  # logits = x (W + s A B)^T: the same matrices, the other way round
                tensors["lm_head.lora_A.weight"], tensors["lm_head.lora_B.weight"] = b, a
                targets.add("lm_head")
        elif a.ndim == 3:
            tensors |= experts_of(path, a, b)
            target = last_part(next(reversed(tensors)).removesuffix(".lora_B.weight"))
        else:
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a.T, b.T
        if "m" in pair:
            tensors[f"{path}.lora_magnitude_vector"] = pair["m"].astype(mx.float32)
        targets.add(target)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": file.rank,
        "lora_alpha": file.scale * file.rank,
        "lora_dropout": file.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,  # its scale is in lora_alpha already
        "use_dora": file.dora,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    prefixed = {f"base_model.model.{name}": mx.contiguous(tensor) for name, tensor in tensors.items()}
    write_folder(Path(folder_out), PEFT_WEIGHTS, prefixed, config)


def experts_of(path: str, a: mx.array, b: mx.array) -> dict[str, mx.array]:
    """The arrays of each expert of a stacked layer under its own Hugging Face name."""
    home, found, name = path.partition(".switch_mlp.")
    if not found:
        raise UserError(f"{path}: PEFT has no adapter for experts that the original model keeps stacked. Export fused.")
    if home.endswith("block_sparse_moe"):
        name = {ours: theirs for theirs, ours in MIXTRAL.items()}[name]
    experts = {f"{home}.experts.{i}.{name}": (a[i], b[i]) for i in range(a.shape[0])}
    return {f"{own}.lora_{side}.weight": x for own, pair in experts.items() for side, x in zip("AB", pair, strict=True)}


def last_part(path: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return path.rpartition(".")[2]
