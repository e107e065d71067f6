"""The model and the layer of experts.py under other libraries' expert parallelism.

DeepSpeed's AutoEP runs on CPUs by itself. Megatron-Core does not: what of CUDA its expert layer touches outside of
arithmetic (the current device, streams, the copy of split sizes to the host) is given a stand-in here, which costs it
nothing; its routing, permutations, exchanges and products are its own.

    pip install --no-deps --target PEERS deepspeed==0.19.8 megatron-core==0.16.1 accelerate einops hjson msgpack \\
        ninja psutil py-cpuinfo pydantic pydantic-core annotated-types typing-inspection     # DS_BUILD_OPS=0
    PYTHONPATH=PEERS python benchmarks/experts.py
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn


def installed(module: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(module) is not None


class Still(torch.optim.SGD):
    """An optimizer that changes nothing: the engine wants one, the benchmark is of gradients."""

    def step(self, closure: Any = None) -> None:
        """Leave every parameter as it is."""


def deepspeed_engine(model: nn.Module, tensor: int) -> Any:
    """DeepSpeed's AutoEP: experts over all ranks, the rest as replicas of its AutoTP over so many."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    mend_recorders()
    ranks = dist.get_world_size()
    experts = {"enabled": True, "autoep_size": ranks, "preset_model": "mixtral"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "expert_parallel": {**experts, "use_grouped_mm": False},  # on CPUs its loop is the faster
    }
    if tensor > 1:
        settings["tensor_parallel"] = {"autotp_size": tensor, "preset_model": "mixtral"}
    mine = copy.deepcopy(model)
    deepspeed.init_distributed("gloo")
    optimizer = Still(mine.parameters(), lr=0.0)
    return deepspeed.initialize(model=mine, optimizer=optimizer, config=settings)[0]


def mend_recorders() -> None:
    """Let AutoEP 0.19 read transformers' table of recorders, whose keys are words since 5.20."""
    registry = importlib.import_module("transformers.utils.output_capturing")._CanRecordRegistry

    def get(self: Any, key: Any, default: Any = None) -> Any:
        if isinstance(key, str):
            return dict.get(self, key, default)
        return dict.get(self, str(type(key))) or {}

    registry.get = get


class Idle:
    """A CUDA stream or event of a machine without CUDA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: Idle()


def megatron_layer(moe: nn.Module, hidden: int, inner: int, experts: int, tensor: int) -> nn.Module:
    """Megatron-Core's expert layer over all ranks (all-to-all dispatcher), with the weights of a Mixtral layer.

    Folded where attention would be tensor parallel (its sequence parallel then, which it demands beside experts).
    Shape: ``[tokens, 1, hidden]`` in, each rank its own; ``([tokens, 1, hidden], bias)`` out.
    """
    ranks = dist.get_world_size()
    replace_cuda_calls()
    core = "megatron.core."
    state: Any = importlib.import_module(core + "parallel_state")
    groups: Any = importlib.import_module(core + "process_groups_config").ProcessGroupCollection
    state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    config = importlib.import_module(core + "transformer.transformer_config").TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": hidden,
            "num_attention_heads": 8,
            "add_bias_linear": False,
        },
        **{"ffn_hidden_size": inner, "moe_ffn_hidden_size": inner, "num_moe_experts": experts},
        **{"gated_linear_unit": True, "activation_func": torch.nn.functional.silu},
        **{"bias_activation_fusion": False, "gradient_accumulation_fusion": False},
        **{"moe_router_topk": 2, "moe_router_load_balancing_type": "none"},
        **{"moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": ranks},
        **{"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1},
        **{"expert_tensor_parallel_size": 1},
        **{"use_cpu_initialization": True, "perform_initialization": False},
    )
    specs: Any = importlib.import_module(core + "models.gpt.moe_module_specs")
    spec = specs.get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
    kind = importlib.import_module(core + "transformer.moe.moe_layer").MoELayer
    layer = kind(
        config, spec.submodules, layer_number=1, pg_collection=groups.use_mpu_process_groups()
    )
    take_weights(layer, moe)
    return layer


def replace_cuda_calls() -> None:
    """Stand in for what Megatron-Core asks of CUDA around the arithmetic."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = Idle
    cuda.current_stream = Idle
    cuda.stream = lambda stream: stream
    moe = "megatron.core.transformer.moe."
    importlib.import_module(moe + "moe_utils").__dict__["te_general_gemm"] = None

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor

    dispatcher: Any = importlib.import_module(moe + "token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = to_host


@torch.no_grad()
def take_weights(layer: Any, moe: Any) -> None:
    """Copy the router, and the experts of this rank."""
    layer.router.weight.copy_(moe.gate.weight)
    mine = list(layer.experts.local_experts)
    for number, expert in enumerate(mine, start=dist.get_rank() * len(mine)):
        expert.linear_fc1.weight.copy_(moe.experts.gate_up_proj[number])
        expert.linear_fc2.weight.copy_(moe.experts.down_proj[number])
