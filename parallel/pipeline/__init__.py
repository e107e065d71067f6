"""Pipeline parallelism: which layers a stage holds, and the schedule that runs them."""

from .edits import pipeline_edits
from .passage import Depart, fetch, of_all_stages
from .split import Split, split_of

__all__ = ["Depart", "Split", "fetch", "of_all_stages", "pipeline_edits", "split_of"]
