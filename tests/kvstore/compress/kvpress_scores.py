"""Make kvpress_scores.safetensors: what kvpress 0.5.5 scores and keeps on a random Llama.

kvpress pins an older transformers, so it lives in an environment of its own: `make oracles` makes it, runs this there
and compares with the file that stands beside it.

    .venv-oracles/bin/python tests/kvstore/compress/kvpress_scores.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

TOKENS, KEEP = 120, 30
LAYERS, WINDOW, THRESHOLD = 7, 10, -0.55  # of the pyramid; of the threshold on KeyDiff


def main() -> None:
    """Run the model once and save each layer's tensors with every press' scores."""
    import kvpress  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=32, vocab_size=97, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(0, 97, (2, TOKENS))
    seen: dict[int, Any] = {}

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen[module.layer_idx] = (kwargs["hidden_states"], output[1], kwargs["position_embeddings"])

    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        layer.self_attn.register_forward_hook(note, with_kwargs=True)
    cache = model(ids, use_cache=True).past_key_values
    ratio = 1 - KEEP / TOKENS
    presses = {
        "snapkv": kvpress.SnapKVPress(ratio, window_size=16, kernel_size=5),
        "tova": kvpress.TOVAPress(ratio),
        "observed": kvpress.ObservedAttentionPress(ratio),
        "knorm": kvpress.KnormPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "lagkv": kvpress.LagKVPress(ratio, lag_size=32),
        "streaming": kvpress.StreamingLLMPress(ratio),
        "expected": kvpress.ExpectedAttentionPress(ratio),
        "expected_mean": kvpress.ExpectedAttentionPress(
            ratio, use_covariance=False, use_vnorm=False
        ),
        "critical": kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio, window_size=16)),
    }
    saved = {"frequencies": model.model.rotary_emb.inv_freq}
    pyramid = kvpress.PyramidKVPress(ratio, window_size=1)
    stand_in = [
        SimpleNamespace(config=SimpleNamespace(num_hidden_layers=LAYERS), layer_idx=n)
        for n in range(LAYERS)
    ]
    saved["pyramid"] = torch.tensor([pyramid.get_layer_budget(m, TOKENS) for m in stand_in])
    for number, (hidden, weights, turn) in seen.items():
        module = model.model.layers[number].self_attn
        k, v = cache.layers[number].keys, cache.layers[number].values
        q = module.q_proj(hidden).view(2, TOKENS, 4, 16).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *turn)
        saved |= {f"{number}.{n}": x for n, x in (("q", q), ("k", k), ("v", v))}
        saved[f"{number}.output"] = module.o_proj.weight
        for name, press in presses.items():
            seen_by = weights if name == "observed" else None
            kwargs = {"position_embeddings": turn}
            scores = press.score(module, hidden, k, v, seen_by, kwargs)
            saved[f"{number}.score.{name}"] = scores
        saved |= {f"{number}.kept.{n}": x for n, x in masks(module, hidden, cache, turn).items()}
    plain = {name: x.detach().float().clone().contiguous() for name, x in saved.items()}
    where = Path(__file__).with_suffix(".safetensors")
    save_file(plain, sys.argv[1] if len(sys.argv) > 1 else where)


def masks(module: Any, hidden: Any, cache: Any, turn: Any) -> dict[str, torch.Tensor]:
    """What presses that mask leave to be seen. Shape: `[batch, kv_heads, tokens]`"""
    import kvpress  # pyright: ignore[reportMissingImports]

    k, v = cache.layers[module.layer_idx].keys, cache.layers[module.layer_idx].values
    kwargs = {"position_embeddings": turn}
    own = kvpress.AdaKVPress(kvpress.SnapKVPress(1 - KEEP / TOKENS, window_size=16))
    dms = kvpress.DMSPress(kvpress.KeyDiffPress(), THRESHOLD, WINDOW)
    place = torch.arange(TOKENS)
    more = {"hidden_states": hidden, "past_key_values": cache, "cache_position": place, **kwargs}
    module.config._attn_implementation = (
        "sdpa"  # what masks refuses eager, which is what gives weights
    )
    out = {}
    for name, run in (
        ("ada", lambda: own.compress(module, hidden, k, v, None, kwargs)),
        ("threshold", lambda: dms.forward_hook(module, [], more, [])),
    ):
        module.masked_key_indices = None
        run()
        out[name] = torch.ones(k.shape[:3], dtype=torch.float64)
        out[name][tuple(module.masked_key_indices)] = 0
    module.masked_key_indices = None
    module.config._attn_implementation = "eager"
    return out


if __name__ == "__main__":
    main()
