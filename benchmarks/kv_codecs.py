"""Codecs of keys and values: encode and decode against transformers' QuantizedCache over quanto and HQQ, at equal bits.

    pip install --no-deps optimum-quanto hqq accelerate einops termcolor ninja    # what is missing is left out
    python benchmarks/kv_codecs.py [--tokens 2048] [--rounds 9]

One layer's keys, `[tokens, 8, 128]` in bfloat16, one thread. "bits" are real ones. quanto and HQQ code groups of 64 as
their cache layers do (`_quantize`, `_dequantize`); int4, int2 and kivi take groups of 64 beside them. All take turns.
Billions of elements a CPU second, min / median / max of the rounds, and to each peer of the same bits the ratio of
medians and, in brackets, of the fastest rounds. "error" is the squared error over the squared keys. Ours decode into a
page that is there (`decode_into`), as the store does; the peers make new tensors, as their caches do at every step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from contest import heading

from plait.kvstore.codecs import PageLayout, bits_per_element, find_codec

OURS = {
    "int2:group=64": "2", "int4:group=64": "4", "int8": "8", "fp8": "8", "kivi:group=64": "2",
    "kivi:bits=4,group=64": "4", "kivi:bits=4": "", "turbo:bits=4": "", "turbo:bits=2": "", "mxfp8": "", "mxfp6": "",
    "mxfp4": "", "mxint8": "", "nvfp4": "", "nvfp4:four=True": "", "mx9": "", "mx6": "", "mx4": "", "bfp": "",
    "ternary": "", "vidkv": "", "exponent": "",
}  # fmt: skip


class Contender:
    """A way to code keys, and how long it took in each round."""

    def __init__(
        self, name: str, bits: str, encode: Callable[[], Any], decode: Callable[[Any], Any]
    ) -> None:
        self.name, self.bits, self.encode, self.decode = name, bits, encode, decode
        self.seconds: dict[str, list[float]] = {"encode": [], "decode": []}
        self.coded: Any = None

    def round(self, keep: bool) -> None:
        """Once there, once back."""
        for what in ("encode", "decode"):
            begin = time.thread_time()
            if what == "encode":
                self.coded = self.encode()
            else:
                self.decode(self.coded)
            if keep:
                self.seconds[what].append(time.thread_time() - begin)


def ours(k: Tensor, chain: str, bits: str, page: Tensor) -> Contender:
    """One of our codecs."""
    codec = find_codec(chain)

    def decode(data: Any) -> Tensor:
        codec.decode_into(data, page)
        return page

    return Contender(chain, bits, lambda: codec.encode(k), decode)


def peers(k: Tensor) -> list[Contender]:
    """The cache layers of transformers, those whose packages are here."""
    found = []
    x = k.movedim(0, 1)[None].contiguous()  # [batch, heads, tokens, head_dim]
    try:
        from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer
    except ImportError:
        return []
    for name, package, kind, widths in (
        ("quanto", "optimum-quanto", QuantoQuantizedLayer, (2, 4)),
        ("HQQ", "hqq", HQQQuantizedLayer, (2, 4, 8)),
    ):
        for bits in widths:
            try:
                layer = kind(nbits=bits)
                layer.keys = x
                layer._dequantize(layer._quantize(x, axis=layer.axis_key))
            except (ImportError, RuntimeError) as error:
                print(f"{name}: left out: {error}")
                break
            found.append(
                Contender(
                    f"{name} {version(package)}, {bits} bits", str(bits),
                    lambda layer=layer: layer._quantize(x, axis=layer.axis_key),
                    lambda coded, layer=layer: layer._dequantize(coded).movedim(2, 0),
                )
            )  # fmt: skip
    return found


def report(k: Tensor, everyone: list[Contender], others: list[Contender]) -> None:
    """Print the table."""
    print(f"{'':34}{'bits':>6}{'error':>9}   encode: Gelement/s, over peers   decode")
    for one in everyone:
        back = one.decode(one.coded).reshape(k.shape).double()
        error = float((back - k.double()).square().sum() / k.double().square().sum())
        size = (
            f"{bits_per_element(one.coded.size, PageLayout.of(k)):.2f}" if one not in others else ""
        )
        line = f"{one.name:34}{size:>6}{error:9.5f}"
        for what in ("encode", "decode"):
            speeds = sorted(k.numel() / t / 1e9 for t in one.seconds[what])
            spread = f"{speeds[0]:.2f}/{statistics.median(speeds):.2f}/{speeds[-1]:.2f}"
            mine = one.seconds[what]
            ratios = [
                f"{statistics.median(peer.seconds[what]) / statistics.median(mine):.1f}x "
                f"({min(peer.seconds[what]) / min(mine):.1f}x) {peer.name.split()[0]}"
                for peer in others
                if peer.bits == one.bits and one not in others
            ]
            line += f"   {spread} {', '.join(ratios)}"
        print(line)


def main() -> None:
    """Read arguments, time, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="codecs whose names begin so, such as kivi,int2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading())
    k = torch.randn(args.tokens, 8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    others = peers(k)
    copy = torch.empty_like(k)
    memcpy = Contender(
        "memcpy", "", lambda: copy.copy_(k).view(torch.uint8).numpy(), lambda _: copy.copy_(k)
    )
    chosen, page = tuple(args.only.split(",")), torch.empty_like(k)
    mine = [ours(k, chain, bits, page) for chain, bits in OURS.items() if chain.startswith(chosen)]
    everyone = [memcpy, *mine, *others]
    for number in range(args.rounds + 2):
        for one in everyone:
            one.round(number >= 2)
    report(k, everyone, others)


if __name__ == "__main__":
    main()
