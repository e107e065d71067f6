"""How ranks meet and talk: launch, collectives with their gradients, a trace of what was sent."""

from .errors import BackendUnavailable, LaunchError, PeerLost
from .launch import Launch
from .trace import Event, Trace
from .world import World, init

__all__ = [
    "BackendUnavailable",
    "Event",
    "Launch",
    "LaunchError",
    "PeerLost",
    "Trace",
    "World",
    "init",
]
