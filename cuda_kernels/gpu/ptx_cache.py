"""PTX kept between processes: a variant takes a second to compile, and a model uses dozens.

An entry's name is a digest of all that the text depends on: the words' templates, the source of every kernel here, the
variant with its constants, the architecture, and the versions of the compiler. Nothing is ever stale, only unused. An
entry carries a digest of its text, so that a torn or changed one is a miss.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .ptx.words import version as words_version

COMPILERS = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "cuda-bindings")
PACKAGE = Path(__file__).resolve().parent.parent


def compiled(
    name: str, arch: tuple[int, int], compile_it: Callable[[], str], folder: Path | None = None
) -> str:
    """Give the PTX of a variant: what an earlier process kept, or what is compiled now and kept.

    A folder that cannot be read or written costs the time to compile, and nothing else.
    """
    place = (folder or default_folder()) / f"{_key(name, arch)}.ptx"
    kept = _read(place)
    if kept is None:
        kept = compile_it()
        _write(place, kept)
    return kept


def default_folder() -> Path:
    """Where entries lie, for this user only."""
    return Path("~/.cache/plait/ptx").expanduser()


def _key(name: str, arch: tuple[int, int]) -> str:
    told = [words_version(), _sources(), _compilers(), name, f"sm_{arch[0]}{arch[1]}"]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


@lru_cache(maxsize=1)
def _sources() -> str:
    """Digest of every file from which kernels are made."""
    files = sorted(PACKAGE.rglob("*.py"))
    texts = (str(file.relative_to(PACKAGE)).encode() + file.read_bytes() for file in files)
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@lru_cache(maxsize=1)
def _compilers() -> str:
    found = []
    for package in COMPILERS:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} from elsewhere")
    return ", ".join(found)


def _read(place: Path) -> str | None:
    try:
        digest, _, text = place.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if digest == hashlib.sha256(text.encode()).hexdigest() else None


def _write(place: Path, text: str) -> None:
    """Write beside it and rename: other processes see all of it or nothing."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
            file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        Path(file.name).replace(place)
