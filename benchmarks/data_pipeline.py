"""A training step of a Llama-shaped model on two ranks: plait's dp and pp against torch's own, wired by hand.

    python benchmarks/data_pipeline.py [--rounds 7] [--hidden 512] [--layers 4]

Every contender is given the same tokens in the same processes, in turn: DistributedDataParallel against ``dp2``,
``fully_shard`` layer by layer against ``dp2:shard``, and torch.distributed.pipelining over hand-cut stages against
``pp2``. A step is forward and backward, and for dp the reduction. Losses are compared with one process'.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contest import Contender, compete, heading, launch, launched, rank, say, table
from torch import Tensor, nn

MICROBATCHES = 4
VOCAB = 8192


def make_model(args: argparse.Namespace) -> Any:
    """The untouched model; the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=args.hidden * 11 // 4, vocab_size=VOCAB,
        max_position_embeddings=args.tokens, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


class Trainer:
    """A model that is called with its own batch and differentiated."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def step(self) -> Tensor:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return loss.detach()


def ddp(model: Any, ids: Tensor) -> Trainer:
    """torch's DistributedDataParallel."""
    return Trainer(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), ids)


def fsdp(model: Any, ids: Tensor) -> Trainer:
    """torch's FSDP2, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = copy.deepcopy(model), init_device_mesh("cpu", (2,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return Trainer(model, ids)


def ours(plan: str) -> Callable[[Any, Tensor], Trainer]:
    """Plait, under a plan."""

    def make(model: Any, ids: Tensor) -> Trainer:
        from plait.parallel import parallelize

        return Trainer(parallelize(copy.deepcopy(model), plan), ids)

    return make


class Stage(nn.Module):
    """Half of a Llama, cut by hand."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        half = len(model.model.layers) // 2
        self.first = rank() == 0
        self.embed = model.model.embed_tokens if self.first else None
        self.layers = model.model.layers[:half] if self.first else model.model.layers[half:]
        self.rotary = model.model.rotary_emb
        self.norm, self.head = (None, None) if self.first else (model.model.norm, model.lm_head)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.embed is None else self.embed(x)
        at = torch.arange(h.shape[1])[None]
        turned = self.rotary(h, at)
        for layer in self.layers:
            h = layer(h, attention_mask=None, position_embeddings=turned, position_ids=at)
        return h if self.head is None or self.norm is None else self.head(self.norm(h))


class ByHand:
    """torch.distributed.pipelining over hand-cut stages."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        from torch.distributed import pipelining

        self.ids = ids
        self.stage = pipelining.PipelineStage(
            Stage(copy.deepcopy(model)), rank(), 2, torch.device("cpu")
        )
        self.schedule = pipelining.Schedule1F1B(self.stage, MICROBATCHES, loss_fn=next_token)

    def step(self) -> Tensor:
        """Forward and backward of all microbatches; the loss goes to all, as everybody's does."""
        self.stage.submod.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        inputs = (self.ids,) if rank() == 0 else ()
        target = None if rank() == 0 else self.ids
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.broadcast(loss, 1)
        return loss


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss transformers computes."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


PARTS: dict[str, dict[str, Callable[[Any, Tensor], Any]]] = {
    "replicas": {"plait dp2": ours("dp2"), "torch DistributedDataParallel": ddp},
    "shards": {"plait dp2:shard": ours("dp2:shard"), "torch fully_shard": fsdp},
    "stages": {
        f"plait pp2, {MICROBATCHES} microbatches": ours(f"pp2:1f1b,microbatches={MICROBATCHES}"),
        "torch pipelining by hand": ByHand,
    },
}


def two_ranks(args: argparse.Namespace) -> None:
    """All contenders in turn; both ranks get the same tokens, so that every loss is one process'."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = make_model(args)
    ids = torch.randint(0, VOCAB, (args.batch, args.tokens))
    say(heading())
    say(
        f"hidden {args.hidden}, {args.layers} layers, {args.batch} x {args.tokens} tokens a rank, float32"
    )
    for name, makers in PARTS.items():
        alone = Contender("one process, 1 thread", Trainer(model, ids).step, False)
        contenders = [alone, *(Contender(n, make(model, ids).step) for n, make in makers.items())]
        compete(contenders, args.rounds, warm=2)
        say(
            "\n"
            + table(
                f"{name}: forward and backward, {args.rounds} rounds",
                contenders,
                next(iter(makers)),
            )
        )
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    if launched():
        two_ranks(args)
        return
    import sys

    launch(__file__, sys.argv[1:], 2)


if __name__ == "__main__":
    main()
