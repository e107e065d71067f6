"""The half of a compressed store that has tiers below: sequences parked and resumed, texts demoted and fetched."""

from __future__ import annotations

import contextlib
from typing import Self
from weakref import finalize

import numpy as np

from ..errors import PoolExhausted, StepError, StoreError
from ..identity import check_tenant, prefix_key
from .depot import Depot
from .lanes import Lanes
from .parcels import ids_of, pack, unpack
from .prefixes import KeptPrefixes, Posts
from .reader import KeptReader
from .sequence import KeptSequence


class Parking(KeptReader):
    """Moves kept tokens to the tiers below and back, whole sequences at a time.

    What is written is what is kept: tokens, their places, coded bytes. The composition is part of the key, as are the
    tenant and this rank's part of the sequence.

    State: of the store, under its lock; each call ends when the bytes are there.
    """

    below: Depot | None
    prefixes: KeptPrefixes
    private: bool
    _identity: bytes
    _secret: bytes
    _end: finalize
    _next: int

    def park(self, seq: KeptSequence, name: str, tenant: str | None = None) -> bool:
        """Write a sequence down under a name and close it: one conversation that waits for its next turn.

        Any composition may be parked, also one whose scorer looks at queries: only who knows tenant and name gets it
        back. Parked again, the new state replaces the old.

        Returns:
            False if the tiers have no room for it (on some rank): it stays open.

        Raises:
            StepError: without tiers, or in the middle of a step.
        Collective: with ranks, one flag.
        """
        key = self._parked(name, tenant)
        with self._lock:
            self._idle(seq)
            below = self._tiers()
            held = self.shard.all(below.put(key, pack(seq, self.pool)))
            if held:
                self.close(seq)
            else:
                below.remove(key)
        return held

    def resume(self, name: str, tenant: str | None = None) -> KeptSequence | None:
        """Go on with a parked sequence; None if there is none, or it was lost or damaged: compute it again.

        Raises:
            PoolExhausted: if the pages do not suffice; it stays parked.
            StepError: without tiers.
        Collective: with ranks, two flags; they all resume or none does.
        """
        key = self._parked(name, tenant)
        with self._lock:
            data = self._tiers().get(key)
            if not self.shard.all(data is not None) or data is None:
                return None
            full: PoolExhausted | None = None
            seq = self._made()
            try:
                self._unpack(data, seq)
            except PoolExhausted as error:
                full = error
            if not self.shard.all(full is None):
                self._empty(seq)
                raise full or StoreError(f"resume {name!r}: another rank's pages do not suffice")
            self._sequences[seq.number] = seq
            return seq

    def flush(self) -> int:
        """Write all texts that are kept for later prompts to the tiers, durably; return how many are new there."""
        with self._lock:
            return sum(self._demote(seq) for seq in self.prefixes.sequences)

    # -- texts that prompts share ------------------------------------------------------------

    def _demote(self, seq: KeptSequence) -> bool:
        """Write down what prompts may find; False if it is there already, or there is no room."""
        if self.below is None or seq.ids is None:
            return False
        posts = Posts(self._bound(seq.key), seq.ids)
        name = posts.text(len(seq.ids))
        if self.below.contains([name]) == [True]:
            return False
        held = self.below.put(name, pack(seq, self.pool, seq.ids))
        at = posts.last
        if held:
            known = self.below.get(posts.post(at)) or b""
            length = len(seq.ids).to_bytes(4, "little")
            self.below.put(posts.post(at), known + length)
        return held

    def _fetch(self, key: bytes, ids: np.ndarray) -> KeptSequence | None:
        """The longest text below that these ids begin with, as a text of ours again.

        Collective: with tp ranks, two flags; all find the same or nothing.
        """
        found, seq = 0, None
        if self.below is not None:
            seq = self._fetched(self.below, key, ids)
            found = 0 if seq is None else seq.tokens
        if self.below is None or self.shard.same(found):
            return seq
        if seq is not None:
            self._empty(seq)
        return None

    def _fetched(self, below: Depot, key: bytes, ids: np.ndarray) -> KeptSequence | None:
        posts = Posts(self._bound(key), ids)
        places = posts.places
        held = below.contains([posts.post(at) for at in places])
        for at in [at for at, yes in zip(places, held, strict=True) if yes][::-1]:
            lengths = np.frombuffer(below.get(posts.post(at)) or b"", "<u4")
            for length in sorted({int(n) for n in lengths if n < len(ids)}, reverse=True):
                data = below.get(posts.text(length))
                if data is not None and np.array_equal(ids_of(data), ids[:length]):
                    seq = self._made()
                    with contextlib.suppress(PoolExhausted):
                        self._unpack(data, seq)
                        seq.ids, seq.key = ids[:length].copy(), key
                        return seq
        return None

    def shutdown(self) -> None:
        """Close the tiers; the store goes on without them. What is parked on disk waits for the next store there."""
        with self._lock:
            below, self.below = self.below, None
            if below is not None:
                self._end.detach()
                below.stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    # -- inside ------------------------------------------------------------------------------

    def _tiers(self) -> Depot:
        if self.below is None:
            raise StepError(
                "this store has no tiers to park in; give it host_bytes=, disk= or tiers="
            )
        return self.below

    def _parked(self, name: str, tenant: str | None) -> bytes:
        key = prefix_key(self._secret, self._identity, check_tenant(tenant))
        return prefix_key(self._bound(key), b"parked", name)

    def _bound(self, key: bytes) -> bytes:
        """A key that is true for this rank's part of sequences."""
        rule = self.shard.rule
        part = f"{rule.shard} {rule.shards} {rule.run} {self.shard.tp_rank} {self.shard.tp_size}"
        return prefix_key(key, b"part", part)

    def _unpack(self, data: bytes, seq: KeptSequence) -> None:
        try:
            unpack(data, seq, self.pool)
        except PoolExhausted:
            self._empty(seq)
            raise

    def _made(self) -> KeptSequence:
        self._next += 1
        return KeptSequence(self, self._next - 1, self.spec.layers, self.spec.kv_heads)

    def _empty(self, seq: KeptSequence) -> None:
        for layer, lanes in enumerate(seq.lanes):
            self.pool.release(lanes)
            seq.lanes[layer] = Lanes.empty(self.spec.kv_heads)
        seq.forget()

    def _idle(self, seq: KeptSequence) -> None:
        seq.require_open()
        if seq.store is not self:
            raise ValueError(f"sequence {seq.number} belongs to another store")
        if seq.step is not None:
            raise busy(seq)

    def close(self, seqs: KeptSequence) -> None:
        """End a sequence."""
        raise NotImplementedError


def busy(seq: KeptSequence) -> StepError:
    """The error of a sequence that has an open step."""
    return StepError(f"sequence {seq.number} has an open step; commit or abort it first")
