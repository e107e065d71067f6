"""Decode and prefill of a Llama-shaped model on two ranks of one thread: plait against its peers.

    python benchmarks/tensor_parallel.py [--rounds 20] [--context 4096] [--size issue|small|large]

All contenders live in the same processes and take turns: one untouched process with one thread and
with as many threads as there are ranks, plait under each of --plans, torch's ``parallelize_module``,
and transformers' ``DistributedConfig``. Every one's logits are compared with the untouched model's. A
second run, on one rank, shows what ``parallelize`` itself costs (plan tp1).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from contest import Contender, compete, heading, launch_parts, launched, rank, ratio, say, table
from torch import Tensor

SIZES = {
    "small": {"hidden": 256, "layers": 4, "heads": 8, "kv_heads": 4, "ffn": 704, "vocab": 4096},
    "issue": {"hidden": 1024, "layers": 8, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocab": 32000},
    "large": {"hidden": 2048, "layers": 8, "heads": 32, "kv_heads": 8, "ffn": 5632, "vocab": 32000},
}


class Reader:
    """A model with a prompt: reads the prompt, then decodes token after token."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.prompt, self.cache = model, prompt, None

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Read the prompt into a new cache; the last token's logits."""
        self.cache = None
        return self._last(self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def decode(self) -> Tensor:
        """One more token on top of the cache."""
        token = self.prompt[:, :1]
        return self._last(self.model(input_ids=token, past_key_values=self.cache, use_cache=True))

    def _last(self, output: Any) -> Tensor:
        self.cache = output.past_key_values
        logits = output.logits[0, -1]
        logits.argmax().item()  # a decoder must know the token: waits for collectives in flight
        return logits


def make_model(size: dict[str, int], context: int) -> Any:
    """The untouched model; the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size["hidden"], num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        intermediate_size=size["ffn"], vocab_size=size["vocab"],
        max_position_embeddings=context + 4096, tie_word_embeddings=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def plait_model(model: Any, plan: str) -> Any:
    """Plait, under a plan."""
    from plait.parallel import parallelize

    return parallelize(copy.deepcopy(model), plan)


def torch_model(model: Any) -> Any:
    """torch.distributed.tensor.parallel, with the plan its Llama tutorial uses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def transformers_model(folder: str) -> Any:
    """transformers' own tensor parallelism, which acts while a checkpoint is loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def two_ranks(args: argparse.Namespace) -> None:
    """All contenders in turn."""
    dist.init_process_group("gloo")
    model, prompt = setting(args)
    if rank() == 0 and args.peers:
        model.save_pretrained(args.folder)
    dist.barrier()
    makers: dict[str, Callable[[], Any]] = {
        f"plait {plan}": lambda plan=plan: plait_model(model, plan) for plan in args.plans
    }
    if args.peers:
        makers["torch parallelize_module"] = lambda: torch_model(model)
        makers["transformers tp_plan=auto"] = lambda: transformers_model(args.folder)
    readers = {name: Reader(make(), prompt) for name, make in makers.items()}
    alone = [
        (f"one process, {n} thread{'s' * (n > 1)}", n, Reader(model, prompt))
        for n in dict.fromkeys((1, dist.get_world_size()))
    ]
    say(heading())
    say(
        f"{args.size} {SIZES[args.size]}, float32, batch 1, {dist.get_world_size()} ranks x 1 thread"
    )
    for phase, rounds in (("prefill", args.prefill_rounds), ("decode", args.rounds)):
        contenders = [Contender(name, getattr(r, phase), False, n) for name, n, r in alone]
        contenders += [Contender(name, getattr(r, phase)) for name, r in readers.items()]
        compete(contenders, rounds, warm=1 if phase == "prefill" else 3)
        what = f"{phase} {'of' if phase == 'prefill' else 'at'} {args.context} tokens"
        ours = f"plait {args.plans[0]}"
        say("\n" + table(f"{what}, {rounds} rounds; ratios to {ours}", contenders, ours))
    dist.destroy_process_group()


def one_rank(args: argparse.Namespace) -> None:
    """What ``parallelize`` costs without another rank; the same model twice shows the noise."""
    model, prompt = setting(args)
    models = {
        "untouched": model,
        "untouched, a second time": copy.deepcopy(model),
        "plait tp1": plait_model(model, "tp1"),
    }
    contenders = []
    for name, each in models.items():
        reader = Reader(each, prompt)
        reader.prefill()
        contenders.append(Contender(name, reader.decode))
    compete(contenders, 3 * args.rounds, warm=3)
    say("\n" + table(f"one rank, decode at {args.context} tokens", contenders, "untouched"))
    base, ours = contenders[0], contenders[2]
    extra = ratio([c[0] for c in ours.cpu_ms], [c[0] for c in base.cpu_ms]) - 1
    say(f"overhead of parallelize (tp1): {100 * extra:+.2f} % of the CPU time of a step")


def setting(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model and the prompt, the same on all ranks."""
    torch.set_num_threads(1)
    model = make_model(SIZES[args.size], args.context)
    prompt = torch.randint(0, SIZES[args.size]["vocab"], (1, args.context))
    return model, prompt


def main() -> None:
    """Run both parts, or the part this process was started for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="issue")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", nargs="+", default=["tp2", "kvp2"])
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--part", choices=["both", "one", "two"], default="both")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if launched():
        one_rank(args) if args.part == "one" else two_ranks(args)
        return
    launch_parts(__file__, sys.argv[1:], {"two": args.ranks, "one": 1}, args.part)


if __name__ == "__main__":
    main()
