"""Weights in and out of a cut model: safetensors slice by slice, state dicts as DTensors, optimizer moments."""

from .moments import track_optimizer
from .state_dict import state_dict_edits
from .weights import load

__all__ = ["load", "state_dict_edits", "track_optimizer"]
