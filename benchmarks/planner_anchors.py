"""The planner's time per token against 35 measured serving points, each predicted by constants fitted to the others.

    python benchmarks/planner_anchors.py [--by hardware] [--aiconfigurator PYTHON]

Columns: what was measured; the left-out prediction and its error; the speed of light of the same formulas (a bound).
With ``--aiconfigurator`` the interpreter of an environment that has it (``pip install aiconfigurator``, 850 MB)
answers the same rows, and its errors stand beside ours. Nothing is timed here and no accelerator is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import defaultdict
from dataclasses import asdict, replace

import numpy as np

from plait.parallel.planner import accuracy
from plait.parallel.planner.efficiency import ideal

# Runs in aiconfigurator's environment: rows in, milliseconds per token (or why not) out.
ASK = """
import json, sys
from importlib.metadata import version
from aiconfigurator.cli.api import cli_estimate
MODELS = {"deepseek-r1": "deepseek-ai/DeepSeek-R1", "kimi-k2": "moonshotai/Kimi-K2.5", "minimax-m2.5":
    "MiniMaxAI/MiniMax-M2.5", "qwen3-32b": "Qwen/Qwen3-32B", "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B-FP8",
    "qwen3.5-397b-a17b": "Qwen/Qwen3.5-397B-A17B"}
SYSTEMS = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "b300": "b300_sxm"}
answers = []
for row in json.load(sys.stdin):
    quant = None if row["precision"] == "bf16" else row["precision"]
    experts = "fp8_block" if quant == "fp8" and row["engine"] == "sglang" else quant
    try:
        said = cli_estimate(
            model_path=MODELS[row["model"]], system_name=SYSTEMS.get(row["hardware"], row["hardware"]),
            backend_name=row["engine"], isl=row["input_tokens"], osl=row["output_tokens"], batch_size=row["batch"],
            tp_size=row["tp"], attention_dp_size=row["dp"], moe_tp_size=row["etp"], moe_ep_size=row["ep"],
            gemm_quant_mode=quant, moe_quant_mode=experts,
            mode="agg" if row["aggregated"] else "static_gen")
        answers.append(float(said.tpot))
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}"[:60])
print(json.dumps({"version": version("aiconfigurator"), "answers": answers}))
"""


def main() -> None:
    """Print the table and its sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--by", choices=("hardware", "model", "engine"), help="also the errors of each group"
    )
    parser.add_argument(
        "--aiconfigurator", metavar="PYTHON", help="interpreter of an environment that has it"
    )
    args = parser.parse_args()
    held = accuracy.leave_one_out()
    light = replace(ideal(), zipf=1.25)
    theirs = ask(args.aiconfigurator, held) if args.aiconfigurator else {}
    print(f"{'':86} measured   left out  error  light   aiconfigurator {theirs.get('version', '')}")
    for i, row in enumerate(held):
        bound = accuracy.predict(row.anchor, light)
        other = theirs["answers"][i] if theirs else ""
        said = (
            f"{other:8.2f} {other / row.anchor.tpot_ms - 1:+6.0%}"
            if isinstance(other, float)
            else other
        )
        print(
            f"{row.anchor.name:86} {row.anchor.tpot_ms:8.2f} {row.predicted_ms:10.2f} {row.error:+6.0%} {bound:6.2f}   "
            f"{said}"
        )
    print(
        f"\nplait: {accuracy.band(held)}; {sum(abs(r.error) <= 0.25 for r in held)} of {len(held)} within 25 %"
    )
    if theirs:
        sum_up(theirs, held)
    if args.by:
        grouped(args.by, held)


def ask(python: str, held: tuple[accuracy.Held, ...]) -> dict:
    """Have the other tool answer the same rows."""
    rows = json.dumps([asdict(row.anchor) for row in held])
    done = subprocess.run(
        [python, "-c", ASK], input=rows, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"aiconfigurator did not answer: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sum_up(theirs: dict, held: tuple[accuracy.Held, ...]) -> None:
    """Print the other tool's errors, and ours on the rows it answered."""
    pairs = [
        (row, said)
        for row, said in zip(held, theirs["answers"], strict=True)
        if isinstance(said, float)
    ]
    errors = np.abs([said / row.anchor.tpot_ms - 1 for row, said in pairs])
    ours = np.abs([row.error for row, _ in pairs])
    print(f"aiconfigurator {theirs['version']}: {len(pairs)} of {len(held)} answered", end="")
    if pairs:
        print(
            f", median {np.median(errors):.0%}, mean {errors.mean():.0%}; plait on those rows: ",
            end="",
        )
        print(f"median {np.median(ours):.0%}, mean {ours.mean():.0%}", end="")
    print()


def grouped(by: str, held: tuple[accuracy.Held, ...]) -> None:
    """Print the errors of each group."""
    groups = defaultdict(list)
    for row in held:
        groups[getattr(row.anchor, by)].append(row.error)
    for name, errors in sorted(groups.items()):
        print(
            f"  {name:20} {len(errors):3} rows, median {np.median(np.abs(errors)):.0%}, bias {np.mean(errors):+.0%}"
        )


if __name__ == "__main__":
    main()
