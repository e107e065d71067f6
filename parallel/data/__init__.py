"""Data parallelism: gradients are the mean over dp, by replicas or by shards."""

from .edits import data_edits
from .replicas import Reducer
from .shards import ShardParameters

__all__ = ["Reducer", "ShardParameters", "data_edits"]
