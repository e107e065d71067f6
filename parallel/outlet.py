"""Row layers whose sum over the ranks can wait for their caller."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .tensor import Link


class Outlet:
    """The link of a row layer whose sum can wait for its caller.

    Whether it can is seen, not assumed: a module that returns the row layer's own tensor has done nothing to it. Until
    its first forward has shown that, the layer sums as usual.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.group = link.group
        self.waits = self.proved = False
        self.out: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Bring an activation into the region."""
        return self.link.enter(x)

    def leave(self, x: Tensor) -> Tensor:
        """Take a partial activation out of the region, or leave its sum to the caller who waits for it."""
        self.out = x if self.waits and self.proved else self.link.leave(x)
        return self.out

    def begin(self) -> None:
        """Let the coming call's sum wait, if it may."""
        self.waits, self.out = True, None

    def end(self, returned: Tensor) -> bool:
        """Say whether ``returned`` still wants its sum."""
        own, waited = returned is self.out, self.proved
        self.waits, self.out = False, None
        if waited and not own:
            raise RuntimeError(
                "a layer that returned its output projection's tensor before returns another one now; "
                "give the plan's tensor axis fuse=false (e.g. 'tp2,fuse=false')"
            )
        self.proved = own
        return waited


def run(outlet: Outlet | None, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, bool]:
    """Call a module that ends in a row layer; say whether its output still wants the ranks' sum."""
    if module._forward_hooks and watched(module):  # they are to see, and may change, the sum
        outlet = None
    if outlet is not None:
        outlet.begin()
    out = module(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return out, outlet is not None and outlet.end(out)


def can_wait(outlet: Outlet | None, module: Any) -> bool:
    """Say whether it is known that the sum of the coming call will wait."""
    return outlet is not None and outlet.proved and not watched(module)


def watched(module: Any) -> bool:
    """Say whether a hook reads what a module returns; one marked ``onlooker`` does not."""
    return any(not hasattr(hook, "onlooker") for hook in module._forward_hooks.values())
