"""Make kvpress_scores.safetensors: what kvpress 0.5.5 scores and keeps on a random Llama.

kvpress pins an older transformers, so it lives in an environment of its own:

    python -m venv oracle && oracle/bin/pip install torch kvpress==0.5.5 transformers==5.2.0
    oracle/bin/python tests/kvstore/compress/kvpress_scores.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TOKENS, KEEP = 120, 30


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
    plain = {name: x.detach().float().clone().contiguous() for name, x in saved.items()}
    save_file(plain, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
