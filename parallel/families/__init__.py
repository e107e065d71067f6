"""Roles of the models we know."""

from .tables import decoder_layers, is_transformers, repeated_layers, roles_of

__all__ = ["decoder_layers", "is_transformers", "repeated_layers", "roles_of"]
