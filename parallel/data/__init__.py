"""Data parallelism: gradients are the mean over dp, by replicas or by shards."""

from .replicas import Reducer, data_edits

__all__ = ["Reducer", "data_edits"]
