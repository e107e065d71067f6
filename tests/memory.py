"""How much memory a process takes while it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Anonymous(TorchDispatchMode):
    """Note the most anonymous memory of this process after any torch operation.

    Safetensors maps its files: a page of a file counts as resident while it is read, and the kernel drops it at
    will. What a rank must have is anonymous memory (RssAnon); ru_maxrss would count both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = self.most = self.now()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        # what a full machine has swapped out is the process's all the same
        return sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\s+(\d+) kB", status))) * 1024

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return out
