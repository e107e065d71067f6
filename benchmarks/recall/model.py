"""The model of the recall benchmark: a stock Llama whose inputs also carry the token before.

A transformer of this size does not learn to look up in minutes unless a key can see its own token and the
one before it (the "key smear" of small recall models). Here the smear is at the input:
``embed(t) + smear(embed(t - 1))``. Everything after it is `transformers.LlamaForCausalLM`, untouched, so that caches,
attention functions and plans for Llama apply to it as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tasks import VOCAB
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

CHECKPOINT = Path(__file__).parent / "checkpoint.safetensors"
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Recall(nn.Module):
    """A Llama and the smear of its inputs.

    Args:
        silent: layers put below that leave the residual stream as it is: then the layer that looks up is not the
            first, which budgets by depth and selectors with dense first layers must be judged on too.
    """

    def __init__(self, silent: int = 0) -> None:
        super().__init__()
        layers = CONFIG["num_hidden_layers"] + silent
        self.silent = silent
        self.llama = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "num_hidden_layers": layers}))
        self.smear = nn.Linear(CONFIG["hidden_size"], CONFIG["hidden_size"], bias=False)
        for layer in self.llama.model.layers[:silent]:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.zeros_(last.weight)

    def inputs(self, ids: Tensor) -> Tensor:
        """Embed whole rows. Shape: `[rows, length]` -> `[rows, length, hidden]`"""
        x = self.llama.model.embed_tokens(ids)
        before = nn.functional.pad(self.smear(x)[:, :-1], (0, 0, 1, 0))
        return x + before

    def forward(
        self,
        ids: Tensor,
        first: int = 0,
        cache: Cache | None = None,
        last: int | None = None,
        shift: int = 0,
    ) -> Tensor:
        """Logits of the tokens `[first, last)` of rows whose tokens before are in the cache.

        Args:
            shift: added to their positions; anything but 0 is wrong, and a control.
        """
        inputs = self.inputs(ids)[:, first:last]
        places = torch.arange(first, first + inputs.shape[1])[None] + shift
        out = self.llama(
            inputs_embeds=inputs,
            past_key_values=cache,
            position_ids=places,
            use_cache=cache is not None,
        )
        return out.logits


def load(silent: int = 0, path: Path = CHECKPOINT) -> Recall:
    """Load the trained model in float32, with silent layers below if wanted."""
    torch.manual_seed(0)  # the silent layers' keys: they are read, and count for nothing
    model = Recall(silent)
    state = {}
    for name, tensor in load_file(path).items():
        if ".layers." in name:
            head, _, rest = name.partition(".layers.")
            number, _, rest = rest.partition(".")
            name = f"{head}.layers.{int(number) + silent}.{rest}"
        state[name] = tensor.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    below = tuple(f"llama.model.layers.{i}." for i in range(silent))
    if unexpected or [m for m in missing if not m.startswith((*below, "llama.lm_head"))]:
        raise ValueError(f"{path.name} is of another model: {missing} {unexpected}")
    return model.eval()


def save(model: Recall, path: Path = CHECKPOINT) -> None:
    """Write the weights in bfloat16; the head is the embedding and is not written twice."""
    state = {n: t.detach().bfloat16().contiguous() for n, t in model.state_dict().items()}
    state.pop("llama.lm_head.weight", None)
    save_file(state, path)
