"""Write a training run's weights as a Hugging Face checkpoint and check that it agrees."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bytes_tokenizer import BOS, EOS, PAD, encode
from model import Shape, TinyLlama, rotary
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

TOLERANCE = 1e-3


def export(state: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` to a folder."""
    shape = Shape()
    weights = torch.load(state, weights_only=True)["model"]
    model = LlamaForCausalLM(LlamaConfig(**shape.config()))
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    ours = TinyLlama(shape)
    ours.load_state_dict(weights)
    difference = largest_difference(ours, model)
    if difference > TOLERANCE:
        raise SystemExit(f"logits differ from transformers' by {difference:.2g}; nothing written")
    model.to(dtype).save_pretrained(folder)
    print(f"wrote {folder}; logits agree with transformers' within {difference:.2g}")


@torch.no_grad()
def largest_difference(ours: TinyLlama, theirs: LlamaForCausalLM) -> float:
    """Return the largest difference of the two models' logits on a line of text, in fp32."""
    ids = torch.tensor([encode("def open(path, mode='r'):\n    return path.open(mode)\n" * 4)])
    shape = ours.model.shape
    cos, sin = rotary(torch.arange(ids.shape[1])[None], shape.head_dim, shape.rope_theta)
    logits: Tensor = theirs.eval()(ids).logits
    return (ours(ids, cos, sin) - logits).abs().max().item()


def main() -> None:
    """Read the command line and export."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the training run")
    parser.add_argument("--to", type=Path, default=here / "checkpoint")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    export(options.folder / "state.pt", options.to, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
