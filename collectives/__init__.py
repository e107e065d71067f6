"""How ranks meet and talk: launch, collectives with their gradients, a trace of what was sent."""

from .errors import BackendUnavailable, CallMismatch, LaunchError, PeerLost
from .launch import Launch
from .timeline import Timeline
from .trace import Event, Trace, span
from .world import World, init

__all__ = [
    "BackendUnavailable",
    "CallMismatch",
    "Event",
    "Launch",
    "LaunchError",
    "PeerLost",
    "Timeline",
    "Trace",
    "World",
    "init",
    "span",
]
