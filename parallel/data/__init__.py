"""Data parallelism: gradients are the mean over dp, by replicas or by shards."""

from .edits import data_edits

__all__ = ["data_edits"]
