"""What each rank would hold and send, found by running the parallel code on meta tensors."""

from .report import Explanation
from .run import explain, token_count

__all__ = ["Explanation", "explain", "token_count"]
