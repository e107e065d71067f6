"""Write the rank tables of Megatron-Core and DeepSpeed for some plans: `python peer_rank_tables.py > rank_tables.json`.

Needs megatron-core, and DeepSpeed's sources, in the environment; the answer is kept beside this script, and
test_folding.py compares it with ours.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from typing import Any

# tp, cp, dp, pp; etp, ep
SIZES = [
    (2, 1, 4, 1, 1, 4), (2, 1, 4, 1, 1, 8), (1, 1, 8, 1, 1, 8), (4, 1, 2, 1, 1, 2), (2, 1, 2, 2, 1, 4),
    (2, 2, 2, 1, 2, 2), (2, 2, 2, 1, 1, 8), (1, 2, 2, 2, 2, 2), (1, 2, 2, 2, 1, 4), (2, 2, 1, 2, 4, 1),
    (2, 2, 1, 2, 1, 2), (2, 2, 2, 2, 2, 4), (4, 1, 2, 2, 2, 2), (2, 1, 4, 2, 1, 8), (1, 4, 2, 2, 2, 2),
    (2, 4, 2, 1, 1, 4),
]  # fmt: skip
ATTENTION = {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp", "cp dp": "dp-cp", "tp cp": "tp-cp"}
EXPERTS = {"etp": "tp", "ep": "ep", "edp": "dp", "etp ep": "tp-ep"}


def megatron(tp: int, cp: int, dp: int, pp: int, etp: int, ep: int) -> dict[str, Any]:
    """Ask Megatron's generators, set up as initialize_model_parallel does."""
    from megatron.core.parallel_state import RankGenerator  # type: ignore[import-not-found]

    edp = tp * cp * dp // (etp * ep)
    order = "tp-cp-ep-dp-pp"
    attention = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    experts = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order=order)
    found = {ours: attention.get_ranks(theirs) for ours, theirs in ATTENTION.items()}
    return found | {ours: experts.get_ranks(theirs) for ours, theirs in EXPERTS.items()}


def deepspeed(folder: str, tp: int, dp: int, pp: int, ep: int) -> dict[str, Any]:
    """Ask DeepSpeed's pure functions, whose file imports nothing but torch."""
    path = f"{folder}/deepspeed/module_inject/auto_ep_folding.py"
    spec = importlib.util.spec_from_file_location("auto_ep_folding", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sizes = module.build_folding_spec(world_size=tp * dp * pp, pp_size=pp, tp_size=tp, ep_size=ep)
    tables = module.expected_folding_group_tables(sizes)
    return {
        "tp": tables.tp_groups, "dp": tables.dense_dp_groups, "ep": tables.ep_groups, "edp": tables.edp_groups
    }  # fmt: skip


def main(deepspeed_folder: str, deepspeed_version: str) -> None:
    """Print the tables of all sizes."""
    rows = []
    for tp, cp, dp, pp, etp, ep in SIZES:
        plan = f"tp{tp} cp{cp} dp{dp} pp{pp} ep{ep} etp{etp}"
        rows.append({"plan": plan, "peer": "megatron", "groups": megatron(tp, cp, dp, pp, etp, ep)})
        if cp == etp == 1:  # what DeepSpeed folds
            groups = deepspeed(deepspeed_folder, tp, dp, pp, ep)
            rows.append({"plan": plan, "peer": "deepspeed", "groups": groups})
    versions = {
        "megatron-core": importlib.metadata.version("megatron-core"),
        "deepspeed": deepspeed_version,
    }
    said = [json.dumps(row, separators=(",", ":")) for row in rows]
    print(
        '{"versions": %s, "tables": [\n%s\n]}' % (json.dumps(versions), ",\n".join(said))  # noqa: UP031
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
