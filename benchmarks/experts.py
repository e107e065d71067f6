"""Forward, and forward with backward, of a Mixtral-shaped model on ranks of one thread: plait against its peers.

    python benchmarks/experts.py [--rounds 5] [--batch 4] [--length 256] [--part two|four|layer|folded|one]

All contenders live in the same processes and take turns: one untouched process, plait under each plan, transformers'
own expert parallel and, where installed, DeepSpeed's AutoEP, alone and with its AutoTP. On two ranks (part two), and on
four with attention over dp 2 and tp 2 and experts folded over all four (part four). Ranks along dp are given the same
batch here, so that everyone's logits can be compared.
Then one layer of experts over two ranks (part layer), and over four, folded (part folded), against Megatron-Core's
where installed (expert_peers.py says how); and the experts of one layer alone, on one rank (part one): plait's grouped
products against transformers'.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contest import Contender, compete, heading, launch_parts, launched, rank, say, table
from expert_peers import deepspeed_engine, installed, megatron_layer
from torch import Tensor

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "vocab_size": 8192,
}
PLANS = {  # by the number of ranks
    2: ["tp2 ep2", "dp2 ep2", "tp2 ep2,exchange=tokens"],
    4: ["dp2:shard tp2 ep4", "dp2 tp2 ep4", "dp2 tp2:sp ep4"],
}
PEERS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "transformers fsdp2 ep2": {"fsdp_size": 2, "ep_size": 2},
        "transformers tp2 ep2": {"tp_size": 2, "ep_size": 2},
    },
    4: {"transformers fsdp2 tp2 ep4": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}},
}
DEEPSPEED = {  # the ranks of its AutoTP; AutoEP has all
    2: {"deepspeed ep2": 1, "deepspeed tp2 ep2 folded": 2},
    4: {"deepspeed tp2 ep4 folded": 2},
}
LAYERS = {2: ("dp2 ep2", 1), 4: ("dp2 tp2:sp ep4", 2)}  # plait's plan, and Megatron-Core's tp


class Step:
    """A model with a batch: a forward pass, and a training step without the optimizer."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        model.train()

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Logits of the last token."""
        return self._logits()[0, -1]

    def both(self) -> Tensor:
        """Forward and backward of a cross entropy."""
        self.model.zero_grad()
        logits = self._logits()
        self.backward(F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()))
        return logits.detach()[0, -1]

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss."""
        loss.backward()

    def _logits(self) -> Tensor:
        return self.model(input_ids=self.ids, use_cache=False).logits


class EngineStep(Step):
    """The same of a DeepSpeed engine, which takes the backward pass and ends the step itself."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, reduced over the ranks."""
        self.model.backward(loss)
        self.model.step()


def make_model() -> Any:
    """The untouched model; the same on every rank."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**{**SHAPE, "attn_implementation": "sdpa"}))


def peer(folder: str, options: dict[str, Any]) -> Any:
    """transformers' own parallelism, which acts while a checkpoint is loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder,
        distributed_config=DistributedConfig(**options),
        dtype=torch.float32,
        attn_implementation="sdpa",
    )


def whole_model(args: argparse.Namespace) -> None:
    """All contenders in turn, on the ranks there are."""
    from plait.parallel import parallelize

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, ranks = make_model(), dist.get_world_size()
    plans = args.plans or PLANS[ranks]
    if rank() == 0:
        model.save_pretrained(args.folder)
    dist.barrier()
    makers: dict[str, Callable[[], Any]] = {
        f"plait {plan}": lambda plan=plan: parallelize(copy.deepcopy(model), plan) for plan in plans
    }
    for name, options in PEERS[ranks].items() if args.peers else ():
        makers[name] = lambda options=options: peer(args.folder, options)
    ids = torch.randint(0, SHAPE["vocab_size"], (args.batch, args.length))
    steps = {name: Step(make(), ids) for name, make in makers.items()}
    if args.peers and installed("deepspeed"):
        for name, tensor in DEEPSPEED[ranks].items():
            steps[name] = EngineStep(deepspeed_engine(model, tensor), ids)
    say(heading("deepspeed"))
    say(f"{SHAPE}, float32, batch {args.batch} x {args.length}, {ranks} ranks x 1 thread")
    for phase in ("forward", "both"):
        alone = Contender("one process, 1 thread", getattr(Step(model, ids), phase), False)
        contenders = [alone, *(Contender(n, getattr(s, phase)) for n, s in steps.items())]
        compete(contenders, args.rounds)
        ours = f"plait {plans[0]}"
        title = "forward" if phase == "forward" else "forward and backward"
        say("\n" + table(f"{title}, {args.rounds} rounds; ratios to {ours}", contenders, ours))
    dist.destroy_process_group()


def one_layer(args: argparse.Namespace) -> None:
    """One layer of experts over all ranks, each with the same tokens, so that outputs can be compared."""
    from plait.parallel import parallelize

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = make_model()
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    untouched = model.model.layers[0].mlp
    torch.manual_seed(1)
    x = torch.randn(1, args.batch * args.length, hidden, requires_grad=True)
    plan, tensor = LAYERS[dist.get_world_size()]
    parallel = cast("Any", parallelize(copy.deepcopy(model), plan))
    cut = parallel.model.layers[0].mlp
    layers: dict[str, Callable[[], Tensor]] = {
        "one process, no exchange": lambda: untouched(x),
        f"plait {plan}": lambda: cut(x),
    }
    if args.peers and installed("megatron.core"):
        experts = SHAPE["num_local_experts"]
        megatron = megatron_layer(untouched, hidden, inner, experts, tensor)
        layers[f"megatron-core tp{tensor} ep{dist.get_world_size()}"] = lambda: megatron(
            x.transpose(0, 1)
        )[0].transpose(0, 1)

    def forward(call: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return call()[0, -1]

    def both(call: Callable[[], Tensor]) -> Tensor:
        with parallel.no_sync():  # the mean over dp is the model's, not the layer's
            out = call()
            out.square().sum().backward()
        return out.detach()[0, -1]

    say("\n" + heading("megatron-core"))
    for title, step in (("forward", forward), ("forward and backward", both)):
        contenders = [Contender(n, lambda c=c, s=step: s(c)) for n, c in layers.items()]
        compete(contenders, args.rounds, warm=2)
        title = f"one layer of experts, {x.shape[1]} tokens a rank, {title}; ratios to plait"
        say("\n" + table(title, contenders, f"plait {plan}"))
    dist.destroy_process_group()


def one_rank(args: argparse.Namespace) -> None:
    """The experts of one layer, whole, on one rank."""
    from plait.parallel.experts.compute import Packed
    from plait.parallel.experts.route import Assignment, inverse

    torch.set_num_threads(1)
    experts = make_model().model.layers[0].mlp.experts
    tokens, top_k = args.batch * args.length, 2
    x = torch.randn(tokens, SHAPE["hidden_size"], requires_grad=True)
    index = torch.rand(tokens, SHAPE["num_local_experts"]).topk(top_k).indices
    weights = torch.rand(tokens, top_k)

    def ours() -> Tensor:
        mine = Assignment.of(index, SHAPE["num_local_experts"])
        rows = x.index_select(0, mine.order // top_k)
        out = Packed.of(experts).rows(experts, rows, mine.counts.tolist())
        pairs = out.index_select(0, inverse(mine.order)).view(tokens, top_k, -1)
        return (pairs * weights.unsqueeze(-1)).sum(1)

    def theirs(name: str) -> Tensor:
        experts.config._experts_implementation = name
        return experts(x, index, weights)

    def step(call: Callable[[], Tensor]) -> Tensor:
        experts.zero_grad()
        out = call()
        out.square().sum().backward()
        return out.detach()[-1]

    contenders = [
        Contender("plait", lambda: step(ours)),
        Contender("transformers grouped_mm", lambda: step(lambda: theirs("grouped_mm"))),
        Contender("transformers eager", lambda: step(lambda: theirs("eager"))),
    ]
    compete(contenders, args.rounds, warm=2)
    title = f"experts of one layer, forward and backward of {tokens} tokens"
    say("\n" + table(f"{title}, {args.rounds} rounds; ratios to plait", contenders, "plait"))


def main() -> None:
    """Run all parts, or the part this process was started for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--plans", nargs="+", help="of parts two and four, in place of their own")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parts = {"two": 2, "four": 4, "layer": 2, "folded": 4, "one": 1}
    parser.add_argument("--part", choices=["both", *parts], default="both")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if launched():
        layer = {"one": one_rank, "layer": one_layer, "folded": one_layer}
        layer.get(args.part, whole_model)(args)
        return
    launch_parts(__file__, sys.argv[1:], parts, args.part)


if __name__ == "__main__":
    main()
