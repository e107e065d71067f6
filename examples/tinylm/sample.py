"""Continue a prompt with the shipped checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bytes_tokenizer import decode, encode
from transformers import LlamaForCausalLM


def continuation(
    model: LlamaForCausalLM, prompt: str, length: int, temperature: float, seed: int
) -> str:
    """Return up to `length` bytes after a prompt; temperature zero is greedy."""
    ids = torch.tensor([encode(prompt)])
    torch.manual_seed(seed)
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        **(choice if temperature > 0 else {"do_sample": False}),
    )
    return decode(output[0, ids.shape[1] :].tolist())


def main() -> None:
    """Read the command line and print the prompt with its continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--length", type=int, default=400, help="bytes to write")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(options.checkpoint).eval()
    text = continuation(model, options.prompt, options.length, options.temperature, options.seed)
    print(options.prompt + text)


if __name__ == "__main__":
    main()
