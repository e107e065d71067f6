"""What a cached page is true for: the model it came from, and the tenant it belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

from .spec import KVSpec

_VERSION = b"plait prefix 1"


@dataclass(frozen=True)
class Identity:
    """Everything besides token ids that a page's content depends on.

    Two stores share pages (through a tier or a directory) only if these are equal; the shape, dtype
    and page size of the `KVSpec` count too.

    Args:
        weights: digest of the weights, adapters included.
        rope: the position encoding's settings, written out.
        shard: which part of the model this rank keeps, such as `"tp 1/2, kvp 0/4"`.
        codec: how pages are coded.
    """

    weights: str = ""
    rope: str = ""
    shard: str = ""
    codec: str = "none"

    def digest(self, spec: KVSpec) -> bytes:
        """Hash identity and layout to 32 bytes."""
        layout = (
            spec.layers, spec.kv_heads, spec.head_dim, spec.v_dim, spec.page_tokens,
            spec.dtype, spec.shared_kv,
        )  # fmt: skip
        fields = [
            str(field).encode("utf-8", "surrogatepass") for field in (*astuple(self), *layout)
        ]
        framed = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
        return hashlib.blake2b(framed, digest_size=32, key=_VERSION).digest()


def prefix_key(secret: bytes, identity: bytes, tenant: str | None) -> bytes:
    """Make the 64-byte key of a tenant's prefix hashes; the name itself is stored nowhere.

    Args:
        secret: what tenants cannot know; 16 to 64 bytes.
        identity: `Identity.digest`.
        tenant: any text; None is the tenant of those who gave none.
    """
    name = b"\0" if tenant is None else b"\1" + tenant.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(identity + name, digest_size=64, key=secret).digest()


def check_secret(secret: bytes) -> bytes:
    """Give the secret back, or refuse it.

    Raises:
        ValueError: if it is no 16 to 64 bytes.
    """
    if not isinstance(secret, bytes) or not 16 <= len(secret) <= 64:
        raise ValueError("secret must be 16 to 64 random bytes, e.g. os.urandom(32)")
    return secret


def check_tenant(tenant: str | None) -> str | None:
    """Give the tenant's name back, or refuse what is no text.

    Raises:
        TypeError: if it is neither text nor None.
    """
    if tenant is not None and not isinstance(tenant, str):
        raise TypeError(f"tenant must be text or None, got {type(tenant).__name__}")
    return tenant
