"""Text of the running Python installation, split into training and held-out documents.

Only the standard library is needed: the text is the language reference in
`pydoc_data/topics.py` and the source of the standard library itself.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

Document = tuple[str, bytes]

REFERENCE = "reference/"
MODULES = "modules/"
TESTS = "tests/"

HELD_OUT_TOPICS = ("types", "comparisons", "import")
HELD_OUT_MODULES = (
    "argparse",
    "configparser",
    "csv",
    "dataclasses",
    "difflib",
    "fractions",
    "heapq",
    "inspect",
    "shlex",
    "statistics",
    "subprocess",
    "tempfile",
    "textwrap",
    "typing",
    "zipfile",
)

_SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__", "lib-dynload"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_LARGEST_SOURCE = 400_000
LONG_LINE = 30  # bytes
OVERLAP = 0.3  # share of long lines a training document may have in common with held-out text
CONTAINED = 0.9  # share above which a topic is a section of another


@functools.cache
def documents() -> list[Document]:
    """Return every document as (name, text), sorted by name.

    Names begin with `reference/`, `modules/` or `tests/`.
    """
    return sorted([*_topic_documents(), *_source_documents()])


@functools.cache
def split() -> tuple[list[Document], list[Document]]:
    """Return (training documents, held-out documents).

    Documents are held out by name, so the choice is the same for every Python version; a
    training document that shares too many of its long lines with a held-out one is dropped.
    """
    held_out = [item for item in documents() if _is_held_out(item[0])]
    seen = {line for _, text in held_out for line in long_lines(text)}
    candidates = [
        (name, text)
        for name, text in documents()
        if not _mentions_held_out(name) and shared(text, seen) <= OVERLAP
    ]
    return _without_contained_topics(candidates), held_out


def held_out_text(kind: str = "all") -> bytes:
    """Return the held-out documents of one kind, joined by blank lines.

    Args:
        kind: "reference" (prose), "modules" (Python source) or "all".
    """
    prefixes = {"reference": (REFERENCE,), "modules": (MODULES,), "all": (REFERENCE, MODULES)}
    if kind not in prefixes:
        raise ValueError(f"kind must be one of {sorted(prefixes)}, not {kind!r}")
    texts = [text for name, text in split()[1] if name.startswith(prefixes[kind])]
    return b"\n\n".join(texts)


def _topic_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        body = text.strip("\n")
        yield f"{REFERENCE}{name}", f"Topic: {name}\n\n{body}\n".encode()


def _source_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if _SKIPPED_FOLDERS.intersection(relative.parts) or _is_generated(relative):
            continue
        text = path.read_bytes().replace(b"\r\n", b"\n")
        if 0 < len(text) <= _LARGEST_SOURCE and _is_utf8(text):
            prefix = TESTS if _TEST_FOLDERS.intersection(relative.parts) else MODULES
            yield f"{prefix}{relative}", text


def _is_generated(relative: PurePosixPath) -> bool:
    return relative.parts[0].startswith(("_sysconfigdata", "config-"))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_held_out(name: str) -> bool:
    kind, _, rest = name.partition("/")
    if kind == "reference":
        return rest in HELD_OUT_TOPICS
    return kind == "modules" and PurePosixPath(rest).parts[0].removesuffix(".py") in (
        HELD_OUT_MODULES
    )


def _mentions_held_out(name: str) -> bool:
    """Tell whether a name is a held-out document or belongs to one, as its tests do."""
    if _is_held_out(name):
        return True
    parts = PurePosixPath(name).with_suffix("").parts[1:]
    tests = tuple(f"test_{module}" for module in HELD_OUT_MODULES)
    owned = any(part in HELD_OUT_MODULES or part.startswith(tests) for part in parts)
    return owned and not name.startswith(REFERENCE)


def long_lines(text: bytes) -> set[bytes]:
    """Return the distinct lines that are long enough to tell one text from another."""
    return {line for raw in text.splitlines() if len(line := raw.strip()) > LONG_LINE}


def shared(text: bytes, seen: set[bytes]) -> float:
    """Return the share of a text's long lines that were seen elsewhere."""
    lines = long_lines(text)
    return len(lines & seen) / len(lines) if lines else 0.0


def _without_contained_topics(candidates: list[Document]) -> list[Document]:
    """Drop reference topics that are sections of a longer one, which would be seen twice."""
    topics = [item for item in candidates if item[0].startswith(REFERENCE)]
    seen: set[bytes] = set()
    contained: set[str] = set()
    for name, text in sorted(topics, key=lambda item: (-len(item[1]), item[0])):
        if shared(text, seen) >= CONTAINED:
            contained.add(name)
        seen |= long_lines(text)
    return [item for item in candidates if item[0] not in contained]
