"""How many tokens each head keeps: one rule a file."""

from .ada import Ada
from .budget import Budget, Widths
from .pyramid import Pyramid
from .threshold import Threshold
from .uniform import Uniform
from .waterfill import WaterFill

__all__ = ["Ada", "Budget", "Pyramid", "Threshold", "Uniform", "WaterFill", "Widths"]
