"""Several tiers as one: put into all, read from the first that has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .choice import Meter
from .errors import TierError, TierReadOnly
from .tier import Page, Tier, byte_views, check_keys
from .wrappers import CountTier

T = TypeVar("T")


class TierStack(Tier):
    """Tiers by name, the fastest first.

    A page is put into each, so a faster one may forget it and a slower one is the whole; what a slower one gives is put
    into those above it. A tier that fails is a tier that misses: its error is counted, and the others are asked.

    Attributes:
        tiers: each behind a `CountTier`.
        meters: bytes per second of what each gives.
    """

    def __init__(self, tiers: Mapping[str, Tier]) -> None:
        if not tiers:
            raise ValueError("TierStack needs at least one tier")
        self.tiers = {name: CountTier(tier) for name, tier in tiers.items()}
        self.meters = {name: Meter() for name in tiers}

    def _try(self, tier: CountTier, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except TierReadOnly:
            return otherwise
        except OSError:  # a TierError, or what a tier of others raises
            tier.add(errors=1)
            return otherwise

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Put into every tier; held if one holds it."""
        self.require_open()
        views = byte_views(keys, pages)
        held = [False] * len(keys)
        for tier in self.tiers.values():
            kept = self._try(tier, lambda tier=tier: tier.put(keys, views), [False] * len(keys))
            held = [a or b for a, b in zip(held, kept, strict=True)]
        return held

    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Ask tier after tier for what the ones before did not have."""
        self.require_open()
        views = byte_views(keys, out, writable=True)
        found: list[int | None] = [None] * len(keys)
        above: list[CountTier] = []
        for name, tier in self.tiers.items():
            left = [i for i, length in enumerate(found) if length is None]
            asked = [keys[i] for i in left]
            if not asked:
                break
            with self.meters[name].running() as moved:
                given = self._try(
                    tier,
                    lambda tier=tier, left=left, asked=asked: tier.get(asked, [views[i] for i in left]),
                    [None] * len(left),
                )  # fmt: skip
                moved(sum(length for length in given if length is not None))
            fresh = [(i, n) for i, n in zip(left, given, strict=True) if n is not None]
            for i, length in fresh:
                found[i] = length
            names, pieces = [keys[i] for i, _ in fresh], [views[i][:n] for i, n in fresh]
            for upper in above if fresh else ():
                self._try(upper, lambda upper=upper: upper.put(names, pieces), [])  # noqa: B023
            above.append(tier)
        return found

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say which pages some tier holds."""
        self.require_open()
        return [at is not None for at in self.where(keys)]

    def where(self, keys: Sequence[bytes]) -> list[str | None]:
        """Name the first tier that holds each page, or None."""
        check_keys(keys)
        found: list[str | None] = [None] * len(keys)
        for name, tier in self.tiers.items():
            left = [i for i, at in enumerate(found) if at is None]
            if not left:
                break
            asked = [keys[i] for i in left]
            held = self._try(
                tier, lambda tier=tier, asked=asked: tier.contains(asked), [False] * len(left)
            )
            for i, yes in zip(left, held, strict=True):
                found[i] = name if yes else None
        return found

    def remove(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove from every tier; a tier that cannot is left as it is."""
        self.require_open()
        held = [False] * len(keys)
        for tier in self.tiers.values():
            gone = self._try(tier, lambda tier=tier: tier.remove(keys), [False] * len(keys))
            held = [a or b for a, b in zip(held, gone, strict=True)]
        return held

    def choose(self, key: bytes, out: Page, right: Callable[[], bool]) -> bool:
        """Ask each tier alone until what it gives is right; what is wrong is removed from the tier that gave it."""
        for tier in self.tiers.values():
            if self._try(tier, lambda tier=tier: tier.get([key], [out]), [None]) == [None]:
                continue
            if right():
                return True
            self._try(tier, lambda tier=tier: tier.remove([key]), [False])
        return False

    def seconds(self, where: Sequence[str | None], page_bytes: int) -> float | None:
        """How long it takes to get pages from those tiers; None if one of them was not measured yet."""
        total = 0.0
        for name, meter in self.meters.items():
            count, rate = where.count(name), meter.bytes_per_second
            if count and rate is None:
                return None
            total += count * page_bytes / rate if rate else 0.0
        return total

    def commit(self) -> None:
        """Commit every tier.

        Raises:
            TierError: what went wrong in one of them; the others are committed.
        """
        self.require_open()
        wrong: Exception | None = None
        for tier in self.tiers.values():
            try:
                tier.commit()
            except TierReadOnly:
                continue
            except OSError as error:
                tier.add(errors=1)
                wrong = error
        if wrong is not None:
            raise wrong if isinstance(wrong, TierError) else TierError(str(wrong)) from wrong

    def counters(self) -> dict[str, float]:
        """Each tier's, its name before each."""
        return {
            f"{name}_{what}": value
            for name, tier in self.tiers.items()
            for what, value in tier.counters().items()
        }

    def close(self) -> None:
        """Close every tier, also if one of them fails."""
        self.closed = True
        with contextlib.ExitStack() as last:
            for tier in self.tiers.values():
                last.callback(tier.close)
