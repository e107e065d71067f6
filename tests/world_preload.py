"""Imported once by the fork server of world.py: every rank starts with the heavy modules in memory.

An import that fails here is not an error: the rank meets it again, with its own traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings

HEAVY = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "pytest",
    "hypothesis",
    "numba",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.generation",
    *(
        f"transformers.models.{family}.modeling_{family}"
        for family in (
            "llama",
            "qwen2",
            "qwen3",
            "mistral",
            "mixtral",
            "gemma3",
            "phi3",
            "deepseek_v3",
            "gpt_oss",
        )
    ),
    "plait.parallel",
    "plait.parallel.attention.paged",
    "plait.parallel.binding",
    "plait.parallel.checkpoint.state_dict",
    "plait.kvstore",
    "plait.collectives",
    "plait.cuda_kernels",
)


def warm_kernels() -> None:
    """Compile what nearly every rank calls, or load it from Numba's cache: forked ranks find it in memory."""
    import torch

    from plait.collectives.shm.warm import compile_kernels
    from plait.kvstore import KVSpec, KVStore

    compile_kernels()
    for dtype in (torch.float64, torch.float32):
        store = KVStore(KVSpec(layers=1, kv_heads=1, head_dim=8, page_tokens=16, dtype=dtype))
        (seq,) = store.open_batch(1)
        step = store.reserve([seq], [3])
        k = torch.ones(3, 1, 8, dtype=dtype)
        store.append(step, 0, k, k)
        store.attend([seq], 0, k.repeat(1, 2, 1), step=step)
        store.commit(step)
        store.close(seq)


def preload() -> None:
    """Import the heavy modules, leaving no thread and no path of ours behind."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    paths = os.environ.pop("PYTHONPATH", "").split(os.pathsep)
    if rest := [path for path in paths if path and path != here]:
        os.environ["PYTHONPATH"] = os.pathsep.join(rest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HEAVY:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        with contextlib.suppress(Exception):
            warm_kernels()
    sys.stdout.flush()


preload()
