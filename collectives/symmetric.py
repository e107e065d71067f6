"""Memory that all ranks of a group have mapped, each rank's own: what kernels over ranks read and write.

On CUDA by torch's symmetric memory, which also gives the address where NVSwitch adds and spreads; where that cannot be
had by CUDA IPC, which works between two processes on one device too. On backend `shm` by its shared segment.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .cards import Card, ranks_of, said, short, tell, together, tried
from .errors import PeerMemoryError
from .peer_driver import CudaDriver, Driver, Mapped

TORCH, IPC = "torch symmetric memory", "CUDA IPC"


@dataclass
class PeerBuffer:
    """One buffer of each rank, mapped by all.

    State: lives until ``close``, which all ranks call, or until the process ends; a tensor of it does not keep it.

    Attributes:
        addresses: of the ranks' buffers in this process, in rank order.
        multicast: the address of all of them at once, 0 if there is none.
        route: how it was had.
        cards: what each rank said of its device.
        passed: why a better route was not taken; "" if none was passed by.
    """

    group: dist.ProcessGroup
    driver: Driver
    size: int
    addresses: list[int]
    multicast: int
    route: str
    cards: list[Card]
    passed: str
    keeps: Any

    @property
    def own(self) -> Tensor:
        """This rank's buffer. Shape: `[size]` uint8"""
        return self.driver.view(self.addresses[self.group.rank()], self.size)

    def close(self) -> None:
        """Give the memory back: first every rank lets go of the others' memory, then frees its own.

        Collective: all ranks of the group; two all-gathers of a card.
        """
        if not self.addresses:
            return
        self.driver.wait()
        tell(self.group, {})  # nobody's kernels run any more
        if self.route == IPC:
            _let_go(self.driver, self.addresses, self.group.rank())
            tell(self.group, {})
            self.driver.free(self.addresses[self.group.rank()])
        self.addresses, self.keeps = [], None


def symmetric_buffer(
    size: int, group: dist.ProcessGroup, driver: Driver | None = None
) -> PeerBuffer:
    """Allocate `size` zero bytes on every rank's device, and map all ranks' into each.

    Collective: all ranks of the group, with the same size; four to six all-gathers of 1 KiB, on the host.

    Raises:
        PeerMemoryError: on every rank alike: ranks on several hosts, no peer access, or what any device said.
    """
    card: Card = {"host": _host(), "size": size, "problem": "no CUDA device", "uuid": ""}
    try:
        driver = driver or CudaDriver()
        own = driver.card()
        card |= own | {"problem": short(own["problem"])}
    except Exception as error:
        card["problem"] = said(error)
    cards = tell(group, card)
    _refuse(_objection(cards))
    assert driver is not None
    _refuse(together(group, _unreached(driver, cards)))
    passed = ""
    if len({one["uuid"] for one in cards}) == len(cards):
        mapped, passed = _by_torch(size, group, driver)
        if mapped is not None:
            return PeerBuffer(
                group, driver, size, mapped.addresses, mapped.multicast, TORCH, cards, "", mapped.keeps
            )  # fmt: skip
    else:
        passed = f"{TORCH}: several ranks share a device"
    addresses = _by_ipc(size, group, driver, passed)
    return PeerBuffer(group, driver, size, addresses, 0, IPC, cards, passed, None)


def symmetric_empty(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, group: Any = None
) -> Tensor:
    """Make a tensor in memory that all ranks of a group have mapped: on the CPU with backend `shm`, else on CUDA.

    Collective: all ranks of the group, with the same shape and dtype.
    State: on CUDA the memory stays until the process ends; hold a `symmetric_buffer` to give it back earlier.

    Raises:
        PeerMemoryError: the ranks cannot map each other's memory.
    """
    found = dist.group.WORLD if group is None else group
    if found is None:
        raise ValueError("symmetric_empty needs a process group; call plait.init() first")
    if getattr(found, "getBackendName", str)() == "shm":
        from .shm.symmetric import symmetric_empty as shared

        return shared(shape, dtype, found)
    count = math.prod(shape)
    try:
        buffer = symmetric_buffer(max(1, count) * dtype.itemsize, found)
    except PeerMemoryError as error:
        if torch.cuda.is_available():
            raise
        raise PeerMemoryError(
            f"{error}; on the CPU give a group of backend 'shm': plait.init('shm'), or new_group(backend='shm') after "
            "plait.collectives.shm.register()"
        ) from error
    return buffer.own.view(dtype)[:count].view(*shape)


def _objection(cards: list[Card]) -> str:
    """Why these ranks cannot share memory; all ranks see the same cards and say the same."""
    sizes, hosts = {card["size"] for card in cards}, {card["host"] for card in cards}
    if len(sizes) > 1:
        return f"ranks ask for buffers of different sizes: {[card['size'] for card in cards]}"
    if len(hosts) > 1:
        named = sorted(host.partition("/")[0] for host in hosts)
        return f"the group's ranks are on {len(hosts)} hosts ({', '.join(named)}); memory is mapped within one host"
    return ranks_of([card["problem"] for card in cards])


def _unreached(driver: Driver, cards: list[Card]) -> str:
    """Why memory of other ranks' devices cannot be reached from this one; "" if nothing is known against it."""
    found, why = tried(lambda: {driver.objection(other["uuid"]) for other in cards} - {""})
    return short(why or "; ".join(sorted(found)))


def _by_torch(size: int, group: dist.ProcessGroup, driver: Driver) -> tuple[Mapped | None, str]:
    """Try torch's symmetric memory; all ranks get it, or none with the reason."""
    own, why = tried(lambda: driver.begin_torch(size))
    refused = together(group, why)  # who cannot even begin would let the others wait
    if not refused:
        mapped, why = tried(lambda: driver.join_torch(own, group))
        refused = together(group, why)
        if not refused:
            return mapped, ""
    return None, f"{TORCH}: {refused}"


def _by_ipc(size: int, group: dist.ProcessGroup, driver: Driver, passed: str) -> list[int]:
    """Exchange IPC handles and open them.

    Raises:
        PeerMemoryError: on every rank, if one of them failed; nothing stays allocated.
    """
    before = f"{passed}; " if passed else ""
    address, why = tried(lambda: driver.allocate(size))
    handle = b""
    if not why:
        handle, why = tried(lambda: driver.export(address))
    cards = tell(group, {"handle": (handle or b"").hex(), "problem": why})
    refused = ranks_of([card["problem"] for card in cards])
    found: list[int] = []
    if not refused:
        try:
            for rank, card in enumerate(cards):
                mine = rank == group.rank()
                found.append(address if mine else driver.open(bytes.fromhex(card["handle"])))
            why = ""
        except Exception as error:
            why = said(error)
        refused = together(group, why)
        if not refused:
            return found
        _let_go(driver, found, group.rank())
        tell(group, {})  # nobody has it open any more
    if address is not None:
        driver.free(address)
    raise PeerMemoryError(f"ranks cannot map each other's memory: {before}{IPC}: {refused}")


def _let_go(driver: Driver, addresses: list[int], rank: int) -> None:
    for peer, address in enumerate(addresses):
        if peer != rank:
            driver.close(address)


def _refuse(why: str) -> None:
    if why:
        raise PeerMemoryError(f"ranks cannot map each other's memory: {why}")


def _host() -> str:
    """Name this host; containers on one machine may share a name, machines in a cloud may too."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"[:200]
