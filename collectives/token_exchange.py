"""All-to-all of rows in uneven numbers: to the ranks that are to work on them, and back.

Two rounds: first every rank says how many rows it has for whom (a small all-gather, one host read), then the rows
travel. The way back needs no numbers, for they are the same. Gloo refuses an all-gather of uneven parts, so rows that
several ranks need are sent to each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import autograd, primitive
from .primitive import Group


@dataclass(frozen=True)
class TokenExchange:
    """How many rows this rank sends to, and receives from, each rank of the group."""

    group: Group
    send: tuple[int, ...]
    receive: tuple[int, ...]

    def there(self, rows: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """Send runs of rows to the ranks of the group; backward brings the gradients back. Inverse: `back`.

        Args:
            meanwhile: what this rank computes while the rows are under way.
        Shape: [sum(send), ...] -> [sum(receive), ...]
        Collective: all ranks of the group; one all-to-all of the rows, and one backward.
        """
        return autograd.all_to_all(rows, self.group, self.send, self.receive, meanwhile)

    def back(self, rows: Tensor) -> Tensor:
        """Return runs of rows to where `there` brought them from.

        Shape: [sum(receive), ...] -> [sum(send), ...]
        Collective: as for `there`.
        """
        return autograd.all_to_all(rows, self.group, self.receive, self.send)

    def sent_bytes(self, row_bytes: int) -> int:
        """Bytes of rows that leave this rank on the way there."""
        own = 0 if self.group is None else self.group.rank()
        return row_bytes * (sum(self.send) - self.send[own])


def tell_counts(counts: Tensor, group: Group) -> Tensor:
    """Tell every rank how many rows of each kind this rank has.

    Shape: [kinds] -> [ranks, kinds], on the CPU
    Collective: all ranks of the group; one all-gather of 4 bytes a kind, and the host reads the answer.
    """
    device = primitive.message_device(group)
    every = primitive.all_gather(counts.to(device, torch.int32)[None].contiguous(), group)
    return every.cpu().long()


def counted(group: Group, table: Sequence[Sequence[int]]) -> TokenExchange:
    """The exchange of which ``table[source][target]`` says the rows."""
    own = 0 if group is None else group.rank()
    return TokenExchange(group, tuple(table[own]), tuple(row[own] for row in table))
