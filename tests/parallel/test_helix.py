"""Helix is exact: the table of plans and models, and every shape of step that serving makes, in float64."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exactness import Case, Pair, Table, assert_exact, case, check_cache, far, world_of, worst
from models import tiny, tokens
from plait.collectives.trace import Trace
from plait.kvstore import KVStore
from plait.parallel import parallelize
from world import run_calls, run_world

CASES = [
    case("kvp2", "llama"),
    case("kvp2,interleave=1", "qwen2"),
    case("kvp2,interleave=2,exchange=partials", "qwen3"),
    case("kvp2,interleave=2,exchange=kv", "qwen3"),
    case("kvp2", "mistral"),
    case("kvp2,interleave=2", "gemma3"),
    case("kvp2,interleave=3,exchange=partials", "phi3"),
    case("kvp2,interleave=2,exchange=kv", "phi3"),
    case("kvp2,interleave=2", "gpt_neox"),
    case("kvp2,interleave=2,exchange=partials,mla=latent", "deepseek"),
    case("kvp2,interleave=2,exchange=partials,mla=value", "deepseek"),
    case("kvp2,interleave=2,exchange=kv", "deepseek"),
    case("kvp2,interleave=2,exchange=partials etp2", "mixtral"),
    case("kvp2,interleave=2,exchange=partials", "gpt_oss"),
    case("kvp2,interleave=2,exchange=kv", "gpt_oss"),
    case("kvp3,interleave=1,exchange=partials", "llama", heads=6, kv_heads=3),
    case("kvp3,interleave=2", "qwen3", heads=6, kv_heads=2),
    case("kvp3,interleave=16", "llama", heads=6, kv_heads=1),
    case("kvp3,interleave=2,exchange=kv", "gpt_neox", heads=6, hidden=60),
    case("kvp2,interleave=2,exchange=partials tp2", "llama"),
    case("kvp2,interleave=2,exchange=kv tp2", "qwen2"),
    case("kvp2,interleave=4 tp2", "qwen3", kv_heads=2),
    case("kvp2,interleave=2,exchange=partials tp2", "gemma3"),
    case("kvp2,interleave=2,exchange=partials tp2", "gpt_oss"),
    case("kvp2,interleave=2,exchange=kv tp2", "gpt_oss"),
    case("kvp2,interleave=2 tp2", "phi3"),
    case("kvp2,interleave=2 tp2 etp4", "mixtral"),
    case("kvp4,interleave=1,exchange=partials", "gpt_neox"),
    case("kvp4,interleave=2,exchange=partials,mla=value", "deepseek"),
    case("kvp4,interleave=16", "mistral", sliding_window=None),
    case("kvp3,interleave=2,exchange=partials tp2", "llama", heads=12, kv_heads=4),
    case("kvp4,interleave=2,exchange=partials tp2", "llama"),
    case("kvp4,interleave=2,exchange=kv tp2", "qwen3"),
    case("kvp2,interleave=2,exchange=partials tp4", "gemma3"),
]
TABLE = Table(CASES)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_helix_is_exact(each: Case) -> None:
    assert_exact(TABLE.errors(each))
