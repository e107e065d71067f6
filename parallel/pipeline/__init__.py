"""Pipeline parallelism: which layers a stage holds, and the schedule that runs them."""

from .edits import pipeline_edits
from .passage import Depart, fetch
from .split import Split, split_of

__all__ = ["Depart", "Split", "fetch", "pipeline_edits", "split_of"]
