"""Loads, stores, flags and multicast: what a kernel does to global memory."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from ..simulator import lane
from .arithmetic import bf16x2
from .words import f32, u32, u64, word

# ---- weak accesses (what a thread does alone), 16 bytes at best


def _load(address: Any, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, lane().load(int(address), struct.calcsize(form)))


def _store(address: Any, form: str, *values: Any) -> None:
    lane().store(int(address), struct.pack(form, *(int(value) for value in values)))


def _four(raw: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(u32(value) for value in raw)


@word("ld.global.v4.b32 {$0,$1,$2,$3}, [$4];", "u32 u32 u32 u32", "u64")
def ld16(address: Any) -> Any:
    """Load 16 bytes as four words; the address is a multiple of 16."""
    assert int(address) % 16 == 0, f"16-byte load at {int(address):#x}"
    return _four(_load(address, "<4I"))


@word(
    "ld.global.nc.L1::no_allocate.v4.b32 {$0,$1,$2,$3}, [$4];",
    "u32 u32 u32 u32",
    "u64",
    pure=True,
)
def ld16_once(address: Any) -> Any:
    """Load 16 bytes that nobody writes during the kernel and that are read once: past L1."""
    return ld16(address)


@word("ld.global.v2.b32 {$0,$1}, [$2];", "u32 u32", "u64")
def ld8(address: Any) -> Any:
    assert int(address) % 8 == 0, f"8-byte load at {int(address):#x}"
    return _four(_load(address, "<2I"))


@word("ld.global.b32 $0, [$1];", "u32", "u64")
def ld4(address: Any) -> Any:
    assert int(address) % 4 == 0, f"4-byte load at {int(address):#x}"
    return u32(_load(address, "<I")[0])


@word("{.reg .b16 t; ld.global.b16 t, [$1]; cvt.u32.u16 $0, t;}", "u32", "u64")
def ld2(address: Any) -> Any:
    """Load two bytes, zero-extended."""
    assert int(address) % 2 == 0, f"2-byte load at {int(address):#x}"
    return u32(_load(address, "<H")[0])


@word("ld.global.u8 $0, [$1];", "u32", "u64")
def ld1(address: Any) -> Any:
    """Load a byte, zero-extended."""
    return u32(_load(address, "<B")[0])


@word("ld.global.b64 $0, [$1];", "u64", "u64")
def ld_u64(address: Any) -> Any:
    """Load an entry of a descriptor table."""
    return u64(_load(address, "<Q")[0])


@word("ld.global.f32 $0, [$1];", "f32", "u64")
def ld_f32(address: Any) -> Any:
    assert int(address) % 4 == 0, f"4-byte load at {int(address):#x}"
    return f32(_load(address, "<f")[0])


@word("st.global.v4.b32 [$0], {$1,$2,$3,$4};", "", "u64 u32 u32 u32 u32")
def st16(address: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    assert int(address) % 16 == 0, f"16-byte store at {int(address):#x}"
    _store(address, "<4I", a, b, c, d)


@word("st.global.v2.b32 [$0], {$1,$2};", "", "u64 u32 u32")
def st8(address: Any, a: Any, b: Any) -> None:
    assert int(address) % 8 == 0, f"8-byte store at {int(address):#x}"
    _store(address, "<2I", a, b)


@word("st.global.b32 [$0], $1;", "", "u64 u32")
def st4(address: Any, value: Any) -> None:
    assert int(address) % 4 == 0, f"4-byte store at {int(address):#x}"
    _store(address, "<I", value)


@word("{.reg .b16 t; cvt.u16.u32 t, $1; st.global.b16 [$0], t;}", "", "u64 u32")
def st2(address: Any, value: Any) -> None:
    """Store the low two bytes."""
    _store(address, "<H", int(value) & 0xFFFF)


@word("st.global.u8 [$0], $1;", "", "u64 u32")
def st1(address: Any, value: Any) -> None:
    """Store the low byte."""
    _store(address, "<B", int(value) & 0xFF)


@word("st.global.f32 [$0], $1;", "", "u64 f32")
def st_f32(address: Any, value: Any) -> None:
    assert int(address) % 4 == 0, f"4-byte store at {int(address):#x}"
    lane().store(int(address), struct.pack("<f", value))


# ---- memory between threads, blocks and ranks: a release publishes what came before, an acquire sees it


@word("ld.acquire.sys.global.u32 $0, [$1];", "u32", "u64")
def ld4_acquire(address: Any) -> Any:
    """Read a flag of any rank; what its release published can be read after it."""
    return u32(lane().acquire(int(address)))


@word("ld.relaxed.sys.global.u32 $0, [$1];", "u32", "u64")
def ld4_relaxed(address: Any) -> Any:
    """Read a flag of any rank, and promise nothing about other memory."""
    return u32(lane().relaxed(int(address)))


@word("st.release.sys.global.u32 [$0], $1;", "", "u64 u32")
def st4_release(address: Any, value: Any) -> None:
    """Publish all this thread (and, after a barrier, its block) has written; then set the flag."""
    lane().release(int(address), int(value))


@word("st.relaxed.sys.global.u32 [$0], $1;", "", "u64 u32")
def st4_relaxed(address: Any, value: Any) -> None:
    """Set a flag that publishes nothing."""
    lane().set_relaxed(int(address), int(value))


@word("red.release.sys.global.add.u32 [$0], $1;", "", "u64 u32")
def add4_release(address: Any, value: Any) -> None:
    """Publish, then add to a counter of any rank."""
    lane().add(int(address), int(value))


@word("atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;", "u32", "u64 u32")
def count4(address: Any, value: Any) -> Any:
    """Publish, add to a counter of this device and return what it was: "am I the last block?"."""
    return u32(lane().add(int(address), int(value), acquire=True))


@word("fence.acq_rel.sys;")
def fence() -> None:
    """Order this thread's accesses before it before those after it, for all ranks."""
    lane().fence()


@word("fence.proxy.alias;")
def fence_alias() -> None:
    """Order accesses to the same memory under its own and its multicast address."""


@word(
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {$0,$1,$2,$3}, [$4];",
    "u32 u32 u32 u32",
    "u64",
)
def multimem_ld16_add_bf16(address: Any) -> Any:
    """Read 8 bfloat16 of every rank at a multicast address and add them in the switch, in float32."""
    total = np.zeros(8, f32)
    for copy in lane().copies(int(address)):
        raw = np.frombuffer(lane().load(copy, 16), np.uint16)
        total = total + (raw.astype(u32) << 16).view(f32)
    return tuple(bf16x2(total[2 * i], total[2 * i + 1]) for i in range(4))


@word(
    "multimem.st.relaxed.sys.global.v4.f32 [$0], {$1,$2,$3,$4};",
    "",
    "u64 u32 u32 u32 u32",
)
def multimem_st16(address: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Write 16 bytes to every rank at a multicast address."""
    for copy in lane().copies(int(address)):
        st16(copy, a, b, c, d)
