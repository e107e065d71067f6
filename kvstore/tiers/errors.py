"""Errors of tiers. A page that cannot be given is not an error: it is a counted miss."""

from __future__ import annotations

from ..errors import StoreError


class TierError(StoreError, OSError):
    """A tier could not do what it promised, and says what still holds."""


class TierClosed(StoreError, ValueError):
    """A closed tier was used."""


class TierReadOnly(StoreError, PermissionError):
    """A tier that was opened for reading was asked to change something, or its directory cannot be written."""


class TierLocked(StoreError, BlockingIOError):
    """Another process writes this directory."""


class TierRefused(StoreError, PermissionError):
    """A path is not what a cache directory may be: a link, another user's, not a plain file."""


class FormatTooNew(StoreError, ValueError):
    """The directory was written by a later version of the format; nothing in it was touched."""

    def __init__(self, what: str, found: int, known: int) -> None:
        self.found, self.known = found, known
        super().__init__(
            f"{what} has format version {found}, this plait reads up to {known}; "
            "update plait, or use another directory"
        )
