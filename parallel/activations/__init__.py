"""What backward needs of forward, kept on the host or on disk meanwhile."""

from .offload import OffloadedActivations, offload_activations

__all__ = ["OffloadedActivations", "offload_activations"]
