"""What can go wrong between ranks, said for the person who reads it."""

from __future__ import annotations

import copy


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


def anew(error: Exception) -> Exception:
    """Make the same error without the frames of those it was raised for before.

    A group keeps the error that ended it and raises it at every later call. Raised itself, it would gather a traceback
    at each call, and keep what those frames hold: their tensors, and the group. Where it was raised is in its cause.
    """
    again = copy.copy(error)
    again.__cause__ = error if error.__traceback__ is not None else error.__cause__
    return again
