"""What can go wrong between ranks, said for the person who reads it."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """The ranks could not become one world: a launcher contradicts another, or a rank is missing."""


class BackendUnavailable(ImportError):
    """The backend that was asked for cannot be used here; the message holds the line that adds it."""


class PeerLost(RuntimeError):
    """Another rank went away while this one waited for it."""


class CallMismatch(RuntimeError):
    """Ranks of a group are in different calls; the message shows both sides."""


class PeerMemoryError(RuntimeError):
    """Ranks cannot map each other's memory; every rank of the group gets it, with the same words."""
