"""Ring attention and Ulysses on CPU ranks of one thread: time, exposed communication and memory.

    python benchmarks/ring_attention.py [--tokens 8192] [--rounds 5] [--ranks 2] [--picotron FOLDER]

Three questions. Attention alone, forward and backward, against one process and picotron's ring (its source in FOLDER;
it has no release, so its commit is the reader's to know). A training step of a small Llama: what share of it is spent
waiting for keys and values that are still on their way. The peak of anonymous memory of that step under cp 1, 2, 4.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contest import Contender, compete, heading, launch, launched, say, table
from torch import Tensor

HEADS, KV_HEADS, WIDTH = 8, 4, 64


def ours(draw: Callable[[], list[Tensor]], choice: str, tokens: int) -> Callable[[], Tensor]:
    """Plait's attention over all ranks, as the models' layers call it."""
    from plait.parallel import Plan
    from plait.parallel.context.attention import Spread, SpreadMask
    from plait.parallel.context.binding import ContextState
    from plait.parallel.folding import Folding
    from plait.parallel.groups import Groups
    from plait.parallel.ranks import ModelRanks

    plan = Plan.parse(f"cp{dist.get_world_size()}:{choice}")
    state = ContextState.of(ModelRanks.of(plan, Groups.create(Folding.of(plan))))
    order = state.order(tokens)
    spread = Spread(order, state.rank, state.ring, state.ulysses, torch.device("cpu"))
    own = [order.take(t, state.rank, dim=2) for t in draw()]

    def call() -> Tensor:
        mask = SpreadMask(spread, spread.visible(lambda r, k: (r[:, None] >= k)[None, None]))
        q, k, v = (t.detach().requires_grad_() for t in own[:3])
        o = mask.attend(q, k, v, WIDTH**-0.5, 0.0, None)
        o.backward(own[3])
        return summed(o, q)

    return call


def picotron(draw: Callable[[], list[Tensor]], folder: str) -> Callable[[], Tensor]:
    """picotron's ring: contiguous parts, plain matrix products; its call of CUDA is left out."""
    torch.cuda.synchronize = lambda *_: None
    sys.path.insert(0, folder)
    import picotron.process_group_manager as groups  # type: ignore[import-not-found]

    groups.setup_process_group_manager(
        tp_size=1, cp_size=dist.get_world_size(), pp_size=1, dp_size=1
    )
    from picotron.context_parallel import context_parallel  # type: ignore[import-not-found]

    q, k, v, grad = draw()
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    own = [t.chunk(dist.get_world_size(), 2)[dist.get_rank()].contiguous() for t in (q, k, v, grad)]

    def call() -> Tensor:
        q, k, v = (t.detach().requires_grad_() for t in own[:3])
        o = context_parallel.ring_attention(q, k, v, WIDTH**-0.5, True)
        o.backward(own[3])
        return summed(o, q)

    return call


def summed(o: Tensor, q: Tensor) -> Tensor:
    """What all ways to attend agree on: sums of output and query gradient over all tokens."""
    assert q.grad is not None
    sums = torch.stack([o.detach().sum(2), q.grad.sum(2)]).flatten()
    dist.all_reduce(sums)
    return sums


def attention(args: argparse.Namespace) -> None:
    """Time attention alone."""

    def draw() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(1, heads, args.tokens, WIDTH, generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        ]

    def alone() -> Tensor:
        *inputs, grad = draw()
        q, k, v = (t.requires_grad_() for t in inputs)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        o.backward(grad)
        assert q.grad is not None
        return torch.stack([o.detach().sum(2), q.grad.sum(2)]).flatten()

    one = Contender("one process, SDPA, 1 thread", alone, everywhere=False)
    all_threads = Contender(
        f"one process, SDPA, {args.ranks} threads", alone, False, threads=args.ranks
    )
    contenders = [one, all_threads]
    contenders += [Contender(f"plait {c}", ours(draw, c, args.tokens)) for c in ("ring", "ulysses")]
    if args.picotron:
        contenders.append(Contender("picotron ring", picotron(draw, args.picotron)))
    compete(contenders, args.rounds)
    say(table(f"\nattention, forward and backward, {args.tokens} tokens", contenders, "plait ring"))


def make_model(tokens: int) -> Any:
    """A Llama of 20 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=HEADS, head_dim=WIDTH,
        num_key_value_heads=KV_HEADS, intermediate_size=1408, vocab_size=8192,
        max_position_embeddings=tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step(args: argparse.Namespace) -> None:
    """Time training steps under cp, what of them is waiting, and their memory."""
    from plait.collectives.ring_exchange import Passing
    from plait.parallel import parallelize

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model, ids = make_model(args.tokens), torch.randint(0, 8192, (1, args.tokens))
    if ranks > 1:
        parallelize(model, f"cp{ranks}")
    waited, walls, busy = [0.0], [], []
    original = Passing.wait

    def wait(self: Passing) -> Tensor:
        begin = time.perf_counter()
        try:
            return original(self)
        finally:
            waited[-1] += time.perf_counter() - begin

    Passing.wait = wait  # type: ignore[method-assign]
    model(ids[:, :64], labels=ids[:, :64]).loss.backward()
    with peak_of_anonymous_memory() as peak:
        for _ in range(args.rounds):
            if ranks > 1:
                dist.barrier()
            waited.append(0.0)
            begin, cpu = time.perf_counter(), time.process_time()
            model(ids, labels=ids).loss.backward()
            walls.append(time.perf_counter() - begin)
            busy.append(time.process_time() - cpu)
    shares = [100 * w / t for w, t in zip(waited[1:], walls, strict=True)]
    say(
        f"cp{ranks}: step {spread(walls)} s, CPU {spread(busy)} s a rank, waited for keys and values "
        f"{spread(shares)} % of it, peak {peak.mib:.0f} MiB above the model"
    )


def spread(values: list[float]) -> str:
    """Smallest, middle and largest."""
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


@contextmanager
def peak_of_anonymous_memory() -> Iterator[Any]:
    """Sample this process's anonymous memory while the body runs; the peak above where it began."""

    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    found, done, start = SimpleNamespace(mib=0.0), threading.Event(), now()

    def sample() -> None:
        while not done.wait(0.005):
            found.mib = max(found.mib, (now() - start) / 1024)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def main() -> None:
    """Run every part on the ranks it needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--picotron", help="a checkout of picotron, to compare with")
    parser.add_argument("--part", choices=["attention", "step"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not launched():
        print(heading(), flush=True)
        launch(__file__, [*sys.argv[1:], "--part", "attention"], args.ranks)
        print("\ntraining step of a Llama of 20 M parameters; min / median / max", flush=True)
        for ranks in (1, 2, 4):
            launch(__file__, [*sys.argv[1:], "--part", "step"], ranks)
        return
    torch.set_num_threads(1)
    import plait

    with plait.init():
        (attention if args.part == "attention" else step)(args)


if __name__ == "__main__":
    main()
