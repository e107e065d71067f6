"""Read a long text under a Helix plan and continue it, then check that one process would have done the same.

    torchrun --standalone --nproc-per-node 4 examples/long_context.py --plan "kvp2 tp2"
    mpirun -n 2 python examples/long_context.py --plan kvp2 --text mybook.txt --tokens 500
    python examples/long_context.py --model path/to/any/huggingface/checkpoint

Every rank reads only its slices of the checkpoint and holds only its share of the keys and values.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinylm.bytes_tokenizer import BOS, decode, encode
from tinylm.data import held_out_text
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import plait

TINYLM = Path(__file__).parent / "tinylm" / "checkpoint"
PLANS = {1: "tp1", 2: "kvp2", 4: "kvp2 tp2", 8: "kvp4 tp2"}


@dataclass
class Reading:
    """What reading a text gave: the cache, the loss, the time, and the logits of the last token."""

    cache: Any
    bits: float
    seconds: float
    last: torch.Tensor


@dataclass
class Text:
    """Token ids and how to turn them back into text."""

    ids: torch.Tensor
    bytes_read: int
    decode: Any


class Clock(BaseStreamer):
    """A streamer that notes when each token came and moves the progress bar."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note a token; the first call brings the prompt, not a new token."""
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self.progress.advance(self.task)

    def end(self) -> None:
        """Nothing is left to do."""

    def milliseconds(self) -> list[float]:
        """Time of each token after the first."""
        return sorted(1e3 * (b - a) for a, b in zip(self.times[1:], self.times[2:], strict=False))


def main() -> None:
    """Read the command line, then read, continue and check."""
    args = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    world = plait.init()
    plan = plait.Plan.parse(args.plan or PLANS.get(world.size, f"tp{world.size}"))
    text = load_text(args)
    model = load_model(args.model, plan)
    console = Console(quiet=world.rank != 0)
    console.print(
        f"[bold]{plan}[/] on {world.size} ranks ({world.launcher}, {world.backend}, {world.threads} threads each); "
        f"{sum(p.numel() for p in model.parameters()):,} parameters on this rank; {text.ids.shape[1]:,} tokens to read"
    )
    with Progress(TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=console, disable=world.rank != 0) as progress:  # fmt: skip
        reading = read(model, text.ids, args.chunk, progress, "reading")
        clock = Clock(progress, progress.add_task("writing", total=args.tokens))
        ids = write(args, model, text.ids, reading, clock)
        collectives = count_collectives(model, ids, reading.cache)
        same = check(args, world, text, ids, reading, progress)
    report(console, text, ids, reading, clock, collectives, same)
    world.close()
    if same is False:
        raise SystemExit("the plan's output differs from one process'")


def arguments() -> argparse.Namespace:
    """Define the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", help='for example "kvp2 tp2"; default by the number of ranks')
    parser.add_argument(
        "--model", type=Path, default=TINYLM, help="a directory with a Hugging Face checkpoint"
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="a file to read; default a held-out part of the Python language reference",
    )
    parser.add_argument("--context", type=int, default=12288, help="most tokens to read")
    parser.add_argument("--tokens", type=int, default=160, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.5, help="of sampling; 0 is greedy")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of one prefill step")
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="skip the comparison with one process",
    )
    args = parser.parse_args()
    for path in (args.model / "config.json", args.text):
        if path is not None and not path.is_file():
            parser.error(f"there is no {path}")
    for name in ("context", "tokens", "chunk"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return args


def load_text(args: argparse.Namespace) -> Text:
    """Tokenize the text: bytes for our own model, the checkpoint's tokenizer for others."""
    raw = args.text.read_bytes() if args.text else held_out_text("reference")
    if (args.model / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ids = tokenizer(raw.decode(errors="replace"), return_tensors="pt").input_ids[
            :, : args.context
        ]
        return Text(
            ids, len(tokenizer.decode(ids[0], skip_special_tokens=True).encode()), tokenizer.decode
        )
    ids = torch.tensor([encode(raw)[: args.context]])
    return Text(ids, int((ids < BOS).sum()), lambda tokens: decode(int(t) for t in tokens))


def load_model(directory: Path, plan: plait.Plan | None) -> Any:
    """Build the model without memory and let each rank fill in its slices; whole and untouched without a plan."""
    config = AutoConfig.from_pretrained(directory)
    if plan is None:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return plait.parallelize(model, plan, weights=directory).eval()


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, chunk: int, progress: Progress, name: str) -> Reading:
    """Prefill in chunks; sum the loss of every token given those before it."""
    cache = model.kv_cache() if hasattr(model, "kv_cache") else DynamicCache(config=model.config)
    task = progress.add_task(name, total=ids.shape[1])
    start, nats, last = time.perf_counter(), 0.0, None
    for at in range(0, ids.shape[1], chunk):
        part = ids[:, at : at + chunk]
        logits = model(part, past_key_values=cache, use_cache=True).logits
        known = logits[0] if last is None else torch.cat([last, logits[0]])
        target = part[0, 1:] if last is None else part[0]
        nats += float(F.cross_entropy(known[: len(target)].double(), target, reduction="sum"))
        last = logits[0, -1:]
        progress.advance(task, part.shape[1])
    assert last is not None
    return Reading(cache, nats / math.log(2), time.perf_counter() - start, last)


@torch.no_grad()
def write(
    args: argparse.Namespace,
    model: Any,
    ids: torch.Tensor,
    reading: Reading,
    clock: Clock | None = None,
) -> torch.Tensor:
    """Continue with transformers' own ``generate``; the cache holds the text but for its last token."""
    reading.cache.crop(-1)  # generate wants at least one token to feed
    choice: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        choice = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 0.95}
    torch.manual_seed(0)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=reading.cache, max_new_tokens=args.tokens,
        min_new_tokens=args.tokens, streamer=clock, pad_token_id=0, **choice,
    )  # fmt: skip


@torch.no_grad()
def count_collectives(model: Any, ids: torch.Tensor, cache: Any) -> str:
    """Trace one decode step and say what it sent."""
    with plait.trace(model) as trace:
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
    counts = ", ".join(f"{n} {op} over {axis}" for (op, axis), n in sorted(trace.counts().items()))
    return f"{counts or 'none'}; {trace.sent_bytes():,} bytes sent by this rank"


def check(
    args: argparse.Namespace,
    world: Any,
    text: Text,
    ids: torch.Tensor,
    reading: Reading,
    progress: Progress,
) -> bool | None:
    """Do the same on rank 0 alone with the untouched model, and compare every token and the loss."""
    same: bool | None = None
    if args.check and world.rank == 0:
        torch.set_num_threads(world.threads * world.local_size)  # the others only wait
        alone = load_model(args.model, None)
        expected = read(alone, text.ids, args.chunk, progress, "checking")
        close = math.isclose(expected.bits, reading.bits, rel_tol=1e-5)
        same = bool(torch.equal(write(args, alone, text.ids, expected), ids)) and close
    torch.distributed.barrier()
    return same


def report(
    console: Console,
    text: Text,
    ids: torch.Tensor,
    reading: Reading,
    clock: Clock,
    collectives: str,
    same: bool | None,
) -> None:
    """Print what was measured on rank 0."""
    times, cache = clock.milliseconds(), reading.cache
    table = Table(show_header=False, box=None)
    table.add_row(
        "read",
        f"{text.ids.shape[1]:,} tokens in {reading.seconds:.1f} s: {text.ids.shape[1] / reading.seconds:,.0f} tokens/s",
    )
    if times:
        table.add_row(
            "write",
            f"{times[len(times) // 2]:.1f} ms a token (median; {times[0]:.1f} to {times[-1]:.1f})",
        )
    if hasattr(cache, "kv_bytes"):
        table.add_row(
            "KV held", f"{cache.kv_bytes:,} bytes on this rank for {cache.lengths[0]:,} tokens"
        )
    table.add_row("a decode step", collectives)
    table.add_row(
        "bits per byte", f"{reading.bits / max(1, text.bytes_read):.3f} on the text it read"
    )
    if same is not None:
        table.add_row("equal to one process", "[green]yes[/]" if same else "[red]no[/]")
    console.print(table)
    console.rule("the end of the text, and how the model goes on")
    shown = text.ids[0, -200:].tolist(), ids[0, text.ids.shape[1] :].tolist()
    console.print(text.decode(shown[0]), style="dim", end="", markup=False, highlight=False)
    console.print(text.decode(shown[1]), style="bold", markup=False, highlight=False)


if __name__ == "__main__":
    main()
