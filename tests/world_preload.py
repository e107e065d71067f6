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
    "transformers.models.llama.modeling_llama",
    "plait.parallel",
    "plait.kvstore",
    "plait.collectives",
    "plait.cuda_kernels",
)


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
    sys.stdout.flush()


preload()
