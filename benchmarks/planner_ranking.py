"""Does the planner rank plans as this machine does? Eleven plans of a small MoE model, predicted and measured.

    python benchmarks/planner_ranking.py [--context 1024] [--rounds 15]

Each world (1, 2 and 4 ranks of one thread) measures its own figures with all ranks running, so that ranks that share
cores share them in the prediction too; then one decode step of a batch is timed under each plan, the least of many
rounds, the slowest rank. What is reported is Spearman's correlation of predicted with measured times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import heading, launch, launched, say
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import plait
from plait.parallel.planner.calibration import calibrate
from plait.parallel.planner.candidates import one
from plait.parallel.planner.efficiency import fitted
from plait.parallel.planner.reading import decoder
from plait.parallel.planner.step_time import Machine, decode_step

SHAPE: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 65536, "sliding_window": None,
}  # fmt: skip
PLANS = {
    1: ("tp1",),
    2: ("tp2", "tp2 etp2", "kvp2", "kvp2 etp2"),
    4: ("tp4", "tp4 etp4", "kvp4", "kvp4 etp4", "kvp2 tp2", "kvp2 tp2 etp4"),
}


def main() -> None:
    """Launch every world, or be one of its ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if launched():
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for ranks in PLANS:
            out = Path(folder) / f"{ranks}.json"
            sizes = [
                f"--context={args.context}",
                f"--batch={args.batch}",
                f"--rounds={args.rounds}",
            ]
            launch(__file__, [*sizes, f"--out={out}"], ranks)
            rows += json.loads(out.read_text())
    report(rows)


def work(args: argparse.Namespace) -> None:
    """Calibrate with all ranks at once, then predict and measure each plan."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    if dist.get_world_size() == 1:
        say(heading("plait"))
    part = calibrate("cpu")
    config = AutoConfig.for_model(**SHAPE, dtype="float32")
    rows = []
    for text in PLANS[dist.get_world_size()]:
        plan = plait.Plan.parse(text)
        machine = Machine(part, fitted(part), "fp32", "fp32", "fp32")
        told = float(
            decode_step(decoder(config), machine, one(plan, args.batch), args.context).total[0]
        )
        torch.manual_seed(0)
        model = plait.parallelize(AutoModelForCausalLM.from_config(config).eval(), plan)
        rows.append([text, told * 1e3, measured(model, args) * 1e3])
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(rows))
    dist.destroy_process_group()


@torch.no_grad()
def measured(model: Any, args: argparse.Namespace) -> float:
    """Seconds of a decode step: the least of the rounds, the slowest rank of each."""
    cache = model.kv_cache() if hasattr(model, "kv_cache") else DynamicCache(config=model.config)
    ids = torch.randint(
        0,
        SHAPE["vocab_size"],
        (args.batch, args.context),
        generator=torch.Generator().manual_seed(0),
    )
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    best = torch.tensor([float("inf")], dtype=torch.float64)
    for _ in range(args.rounds):
        dist.barrier()
        start = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        best = torch.minimum(best, took)
    return float(best)


def report(rows: list[list[Any]]) -> None:
    """Print both columns and the correlation of their ranks."""
    from scipy.stats import spearmanr

    rows.sort(key=lambda row: row[2])
    print(f"\n{'plan':16} {'predicted ms':>14} {'measured ms':>14}")
    for text, told, seen in rows:
        print(f"{text:16} {told:14.2f} {seen:14.2f}")
    found = spearmanr([row[1] for row in rows], [row[2] for row in rows])
    print(f"\nSpearman {found.statistic:.2f} over {len(rows)} plans")


if __name__ == "__main__":
    main()
