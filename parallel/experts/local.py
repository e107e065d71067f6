"""Experts that cost nothing or next to nothing: computed where the token is, they never cross ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LocalExperts(nn.Module):
    """MoE++'s zero-computation experts: ``zero`` that give nothing, ``copy`` the token, ``constant`` a learnt vector.

    A constant expert mixes the token with its vector: ``a x + (1 - a) v`` with ``a`` a sigmoid of the token (the
    paper's softmax over two). Experts are numbered in this order; pairs of other numbers are not theirs.

    Shape: hidden [tokens, hidden], index, weights [tokens, top_k] -> [tokens, hidden]
    Source: MoE++ (arXiv 2410.07348) section 3.1.
    """

    def __init__(self, hidden: int, zero: int = 1, copy: int = 1, constant: int = 1) -> None:
        super().__init__()
        self.zero, self.copy, self.constant = zero, copy, constant
        self.vector = nn.Parameter(torch.zeros(constant, hidden))
        self.mix = nn.Parameter(torch.zeros(constant, hidden))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        copied = (index >= self.zero) & (index < self.zero + self.copy)
        out = hidden * (weights * copied).sum(1, keepdim=True)
        first = self.zero + self.copy
        for e, (vector, mix) in enumerate(zip(self.vector, self.mix, strict=True), first):
            share = (weights * (index == e)).sum(1, keepdim=True)
            own = torch.sigmoid(hidden @ mix).unsqueeze(-1)
            out = out + share * (own * hidden + (1 - own) * vector)
        return out.to(hidden.dtype)
