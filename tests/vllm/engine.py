"""A real vLLM engine on this CPU, with a tiny random model: run as a program, one scenario a process.

python engine.py SCENARIO FOLDER [JSON of arguments]        -> one line of JSON after "RESULT "
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
}
BLOCK = 32  # tokens; CPU attention wants multiples of it
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # so that attention has a say in what comes out
}


def prompt(length: int = 600, seed: int = 7) -> list[int]:
    """Token ids; two seeds differ from the first on."""
    return [(i * seed + seed) % 500 + 3 for i in range(length)]


def make_model(folder: Path, kind: str = "llama", seed: int = 0) -> str:
    """Save a model with random weights, unless it is there."""
    if folder.exists():
        return str(folder)
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        layers = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(
            **SIZES, sliding_window=96, layer_types=layers, tie_word_embeddings=False
        )
        model = Gemma3ForCausalLM(config)
    model.float().save_pretrained(folder)
    return str(folder)


class Engine:
    """An LLM with a connector, asked by token ids; greedy."""

    def __init__(self, model: str, transfer: dict[str, Any] | None, **options: Any) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=options.pop("max_model_len", 2048),
            enforce_eager=True,
            disable_log_stats=False,  # so that what ours counts goes through vLLM's statistics
            block_size=BLOCK,
            enable_prefix_caching=True,
            kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
            **options,
        )

    def ask(self, *prompts: list[int], salt: str | None = None, tokens: int = 6) -> dict[str, Any]:
        """Answer prompts together: tokens, their log probabilities, and how many of each prompt were cached."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": p, **({"cache_salt": salt} if salt else {})} for p in prompts]
        sampling = SamplingParams(
            max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True, logprobs=1
        )
        answers = self.llm.generate(asked, sampling, use_tqdm=False)
        return {
            "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
            "logprobs": [round(answer.outputs[0].cumulative_logprob, 4) for answer in answers],
            "cached": [answer.num_cached_tokens for answer in answers],
        }

    def ask_anew(self, *prompts: list[int], **options: Any) -> dict[str, Any]:
        """The same after the engine's own prefix cache was dropped."""
        assert self.llm.reset_prefix_cache()
        return self.ask(*prompts, **options)

    def ours(self) -> Any:
        """What of ours holds the tier: the connector's worker, or the tier; in this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = getattr(get_kv_transfer_group(), "_worker", None)
        if worker is not None:
            return worker
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        return connector.connector_scheduler.manager.secondary_tiers[0]

    def counters(self) -> dict[str, float]:
        """What ours counted."""
        return self.ours().counters()

    def close(self) -> None:
        """End as an engine does."""
        self.llm.llm_engine.engine_core.shutdown()


def connector(folder: Path, **extra: Any) -> dict[str, Any]:
    """The configuration that docs/vllm.md tells users to give."""
    return {
        "kv_connector": "PlaitConnector",
        "kv_connector_module_path": "plait.kvstore.engines.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "path": str(folder / "cache"),
            "max_bytes": "64MiB",
            **extra,
        },
    }


def tiered(folder: Path, **extra: Any) -> dict[str, Any]:
    """The same for the tier below vLLM's own CPU tier; that one has room for 24 chunks."""
    tier = {
        "type": "PlaitTier",
        "module_path": "plait.kvstore.engines.vllm_tier",
        "path": str(folder / "tier"),
        "max_bytes": "64MiB",
        **extra,
    }
    return {
        "kv_connector": "PlaitOffloadingConnector",
        "kv_connector_module_path": "plait.kvstore.engines.vllm_tier",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_offload",
            "cpu_bytes_to_use": 24 * 128 << 10,
            "offload_prompt_only": False,
            "secondary_tiers": [tier],
        },
    }


def start(folder: Path, kind: str, way: str, **extra: Any) -> Engine:
    """An engine with one of the two plug-ins, by the name of its configuration here."""
    transfer = globals()[way](folder, **extra)
    return Engine(make_model(folder / kind, kind), transfer)


def first(folder: Path, kind: str, way: str) -> dict[str, Any]:
    """An empty directory: fill it, drop the engine's own cache, be served from disk; by tenant, by turn."""
    engine = start(folder, kind, way)
    long = prompt(580)
    turn = engine.ask(long, tokens=40)["tokens"][0]
    result = {
        "cold": engine.ask_anew(prompt(seed=11)),
        "own": engine.ask(prompt(seed=11)),
        "disk": engine.ask_anew(prompt(seed=11)),
        "longer": engine.ask_anew(prompt(640, seed=11)),
        "second turn": engine.ask_anew([*long, *turn, 5, 6, 7]),
        "salted": engine.ask_anew(prompt(seed=11), salt="alice"),
        "salted again": engine.ask_anew(prompt(seed=11), salt="alice"),
        "other salt": engine.ask_anew(prompt(seed=11), salt="bob"),
        "counters": engine.counters(),
    }
    engine.close()
    return result


def again(folder: Path, kind: str, way: str) -> dict[str, Any]:
    """A directory that another process filled, and somebody perhaps damaged."""
    engine = start(folder, kind, way)
    result = {
        "disk": engine.ask(prompt(seed=11)),
        "counters": engine.counters(),
        "disk again": engine.ask_anew(prompt(seed=11)),
    }
    engine.close()
    return result


def noise(folder: Path, kind: str, way: str) -> dict[str, Any]:
    """Every page replaced by noise, under valid checksums: if pages are used at all, the answer changes."""
    import numpy as np

    engine = start(folder, kind, way)
    ours = engine.ours()
    keys = ours._held.keys()
    page = np.random.default_rng(0).standard_normal(ours._tier.page_bytes // 4, np.float32)
    ours._tier.remove(keys)
    assert all(ours._tier.put(keys, [page] * len(keys)))
    result = {"disk": engine.ask(prompt(seed=11)), "counters": engine.counters()}
    engine.close()
    return result


def weights(folder: Path, kind: str, way: str) -> dict[str, Any]:
    """Other weights and other RoPE settings than the pages are of; then a reset, as after new weights."""
    engine = Engine(make_model(folder / "other", kind, seed=1), globals()[way](folder))
    result = {
        "other": engine.ask(prompt(seed=11)),
        "other again": engine.ask_anew(prompt(seed=11)),
    }
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    result["reset"] = engine.ask(prompt(seed=11))
    result["after reset"] = engine.ask_anew(prompt(seed=11))
    engine.close()
    return result


def crowd(folder: Path, kind: str, way: str | None, max_bytes: str = "64MiB") -> dict[str, Any]:
    """Ten requests at once, prefilled in chunks, with room for a few of them: preemption and sharing; twice."""
    transfer = globals()[way](folder, max_bytes=max_bytes) if way else None
    engine = Engine(
        make_model(folder / kind, kind),
        transfer,
        max_model_len=768,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        num_gpu_blocks_override=48,
    )
    prompts = [[*prompt(200 + 40 * (i % 3)), *prompt(60 + 30 * i, seed=13 + i)] for i in range(10)]
    result = {
        "once": engine.ask(*prompts, tokens=12),
        "twice": engine.ask_anew(*prompts, tokens=12),
        "counters": engine.counters() if way else {},
    }
    engine.close()
    return result


def sharded(folder: Path) -> dict[str, Any]:
    """Two tensor-parallel workers, each with pages of its own heads."""
    engine = Engine(
        make_model(folder / "llama"),
        connector(folder),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_model_len=768,
    )
    result = {"first": engine.ask(prompt(seed=11)), "disk": engine.ask_anew(prompt(seed=11))}
    engine.close()
    return result


def refusals(folder: Path) -> dict[str, Any]:
    """What cannot be kept safely, and what is said of it."""
    from types import SimpleNamespace as Some

    import torch
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec

    from plait.kvstore.engines import vllm_connector, vllm_model, vllm_pages, vllm_tier

    def config(**changes: Any) -> Any:
        cache = {"prefix_caching_hash_algo": "sha256", "calculate_kv_scales": False, **changes}
        parallel = Some(
            decode_context_parallel_size=cache.pop("dcp", 1), prefill_context_parallel_size=1
        )
        method = cache.pop("method", None)
        return Some(
            cache_config=Some(**cache),
            parallel_config=parallel,
            speculative_config=Some(method=method),
            kv_transfer_config=Some(
                kv_load_failure_policy=cache.pop("policy", "recompute"),
                kv_connector_extra_config=cache.pop("extra", {"path": "x", "max_bytes": 1}),
            ),
        )

    def said(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
        try:
            call(*arguments, **named)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    mamba = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    groups = Some(
        kv_cache_groups=[KVCacheGroupSpec(["m.0"], mamba)], prefix_cacheable_group_ids=(0,)
    )
    role, connect = vllm_connector.KVConnectorRole.SCHEDULER, vllm_connector.PlaitConnector
    nowhere = Some(
        model_config=Some(model="no/where", hf_config=Some()), load_config=Some(load_format="auto")
    )
    strided = torch.zeros(8, 2, 64)[:, :, ::2]
    spec = Some(config=Some())
    return {
        "fine": said(vllm_model.refuse, config()),
        "ngram": said(vllm_model.refuse, config(method="ngram")),
        "hash": said(vllm_model.refuse, config(prefix_caching_hash_algo="xxhash")),
        "scales": said(vllm_model.refuse, config(calculate_kv_scales=True)),
        "context parallel": said(vllm_model.refuse, config(dcp=2)),
        "draft": said(vllm_model.refuse, config(method="eagle")),
        "policy": said(connect, config(policy="fail"), role, groups),
        "options": said(connect, config(extra={"path": "x", "max_byte": 1}), role, groups),
        "mamba": said(vllm_pages.page_groups, groups, 32),
        "weights": said(vllm_model.weights_digest, nowhere),
        "strides": said(vllm_pages.LayerRows, "l", strided, 8),
        "tuple": said(vllm_pages.LayerRows, "l", (strided, strided), 8),
        "secret": said(vllm_model.PageKeys, b"", b"short"),
        "model": said(
            vllm_tier.PlaitTier,
            spec,
            memoryview(bytearray(64)).cast("B", (8, 8)),
            "PlaitTier",
            path=str(folder / "tier"),
            max_bytes="1MiB",
        ),
    }


def main() -> None:
    scenario, folder, *arguments = sys.argv[1:]
    os.environ.update(SETTINGS)
    sys.path.insert(0, str(Path(__file__).parent))  # where vLLM finds cpu_offload
    run: Callable[..., dict[str, Any]] = globals()[scenario]
    result = run(Path(folder), **(json.loads(arguments[0]) if arguments else {}))
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
