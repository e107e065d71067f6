"""Reading a model: a Hugging Face config (dict, object or file) or a shipped name, into a Decoder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import PlanError, suggestion
from ..shape import ModelShape
from .configs import CONFIGS
from .shapes import Attention, Decoder, Ffn, LayerKind

NEEDED = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "value_head_dim": "v_head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}
BIASED = {"qwen2", "qwen2_moe", "gpt_oss"}  # biases on q k v that no field of the config tells
QK_NORM = {"qwen3", "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text"}


def decoder(model: Any) -> Decoder:
    """Read a model from whatever names it: a shipped name, a config.json, its directory, a config.

    Raises:
        PlanError: nothing of that name, or a config that lacks what the planner needs.
    """
    if isinstance(model, Decoder):
        return model
    if isinstance(model, str | Path):
        return _named(str(model))
    if isinstance(model, ModelShape):
        return from_shape(model)
    config = getattr(model, "config", model)
    if not isinstance(config, Mapping) and not hasattr(config, "hidden_size"):
        config = getattr(config, "text_config", config)
    fields = config if isinstance(config, Mapping) else config.to_dict()
    return from_config(fields, name=str(fields.get("model_type", "a config")))


def _named(name: str) -> Decoder:
    key = name.lower().rsplit("/", 1)[-1]
    if key in CONFIGS:
        fields, source = CONFIGS[key]
        return from_config(fields, name=key, source=source)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise PlanError(
            f"model {name!r}",
            "is no config.json, no directory of one and no name we ship",
            suggestion(key, CONFIGS),
        )
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(
            f"model {name!r}", f"is not a config ({error})", "give a config.json"
        ) from None
    if not isinstance(fields, dict):
        raise PlanError(f"model {name!r}", "is not an object of fields", "give a config.json")
    return from_config(fields, name=path.parent.name or name, source=str(name))


def from_config(fields: Mapping[str, Any], *, name: str = "", source: str = "") -> Decoder:
    """Read the fields of a config.json; a multimodal one by its ``text_config``.

    Raises:
        PlanError: naming the first field that is missing.
    """
    outer = dict(fields)
    inner = (
        {**outer, **outer["text_config"]}
        if isinstance(outer.get("text_config"), Mapping)
        else outer
    )
    inner.pop("text_config", None)
    shape = ModelShape.from_config(SimpleNamespace(**inner))
    return from_shape(shape, inner, name=name, source=source)


def from_shape(
    shape: ModelShape, fields: Mapping[str, Any] | None = None, *, name: str = "", source: str = ""
) -> Decoder:
    """Make a Decoder of a ModelShape, with what only the config knows beside it."""
    fields = fields or {}
    experts_only = bool(shape.expert_layers) and all(shape.expert_layers)
    for ours, theirs in NEEDED.items():
        if getattr(shape, ours) is None and not (ours == "ffn" and experts_only):
            raise PlanError(
                f"the config of {name or 'the model'}", f"has no {theirs}", f"add {theirs}"
            )
    if shape.experts and not shape.experts_per_token:
        raise PlanError(
            f"the config of {name or 'the model'}", "has experts and no num_experts_per_tok",
            "add num_experts_per_tok",
        )  # fmt: skip
    found = Counter(_layers(shape, fields))
    kinds = tuple(LayerKind(count, *layer) for layer, count in found.items())
    return Decoder(
        name=name or "model",
        shape=shape,
        kinds=kinds,
        vocab=shape.vocab or 0,
        tied=shape.tied,
        source=source or "a config that was given",
    )


def _layers(shape: ModelShape, fields: Mapping[str, Any]) -> list[tuple[Attention, Ffn]]:
    layers = shape.layers or 0
    kinds = fields.get("layer_types") or ["full_attention"] * layers
    if len(kinds) != layers:
        asked = f"layer_types of {len(kinds)} entries"
        raise PlanError(asked, f"is not num_hidden_layers={layers}", "give one entry per layer")
    windows = shape.window_layers or (False,) * layers
    routed = shape.expert_layers or (False,) * layers
    return [
        (
            _attention(shape, fields, kinds[i] == "linear_attention", windows[i]),
            _ffn(shape, fields, routed[i]),
        )
        for i in range(layers)
    ]


def _attention(
    shape: ModelShape, fields: Mapping[str, Any], linear: bool, window: bool
) -> Attention:
    kind = fields.get("model_type", "")
    mla = shape.attention == "mla"
    width = {
        "hidden": shape.hidden, "heads": shape.heads, "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "value_head_dim": shape.value_head_dim,
    }  # fmt: skip
    if linear:
        return Attention(**width, **_linear(shape.hidden or 0, fields))  # type: ignore[arg-type]
    return Attention(
        **width,  # type: ignore[arg-type]
        window=shape.window if window else None,
        q_rank=shape.q_lora_rank if mla else fields.get("share_q_dim"),
        kv_rank=shape.kv_lora_rank if mla else None,
        rope_dim=(shape.qk_rope_head_dim or 0) if mla else 0,
        bias=bool(fields.get("attention_bias", kind in BIASED)),
        output_bias=bool(fields.get("attention_bias", kind == "gpt_oss"))
        and kind not in BIASED - {"gpt_oss"},
        qk_norm=2 * (shape.head_dim or 0) if kind in QK_NORM else 0,
        sinks=shape.sinks,
    )


def _linear(hidden: int, fields: Mapping[str, Any]) -> dict[str, int]:
    """Gated delta rule: q and k of key heads; v, gate and output of value heads; one state per value head."""
    names = ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim")
    missing = next((f"linear_{name}" for name in names if f"linear_{name}" not in fields), None)
    if missing:
        raise PlanError("a config with linear attention", f"has no {missing}", f"add {missing}")
    keys, key_dim, values, value_dim = (int(fields[f"linear_{name}"]) for name in names)
    mixer = hidden * (2 * keys * key_dim + 3 * values * value_dim + 2 * values)
    return {"state": values * key_dim * value_dim, "mixer": mixer}


def _ffn(shape: ModelShape, fields: Mapping[str, Any], routed: bool) -> Ffn:
    hidden, kind = shape.hidden or 0, fields.get("model_type", "")
    if not routed:
        return Ffn(hidden=hidden, width=shape.ffn or 0)
    return Ffn(
        hidden=hidden,
        width=shape.moe_ffn,
        experts=shape.experts or 0,
        per_token=shape.experts_per_token,
        shared=shape.shared_ffn,
        latent=fields.get("moe_latent_size"),
        zero=fields.get("zero_expert_num") or 0,
        bias=kind == "gpt_oss",
        gate_of_shared=kind in ("qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text"),
        choice_bias=fields.get("topk_method") == "noaux_tc",
    )
