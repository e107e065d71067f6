"""The disk tier on a real file system."""

from __future__ import annotations

from plait.kvstore.tiers import DiskTier
from plait.kvstore.tiers.testing import TierConformance

SIZE = {"page_bytes": 3000, "max_bytes": 4096 + 8 * 8192}


class TestDiskTier(TierConformance):
    def make_tier(self, tmp_path):
        return DiskTier(tmp_path / "cache", **SIZE)
