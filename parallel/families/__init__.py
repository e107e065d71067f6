"""Roles of the models we know."""

from .source import forward_code
from .tables import decoder_layers, is_transformers, repeated_layers, roles_of

__all__ = ["decoder_layers", "forward_code", "is_transformers", "repeated_layers", "roles_of"]
