"""Pipeline parallelism: which layers a stage holds, and the schedule that runs them."""

from .edits import pipeline_edits
from .measure import measure_layers
from .passage import Depart, fetch, of_all_stages
from .rule import Stages
from .split import Split, split_of

__all__ = [
    "Depart",
    "Split",
    "Stages",
    "fetch",
    "measure_layers",
    "of_all_stages",
    "pipeline_edits",
    "split_of",
]
