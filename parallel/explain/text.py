"""The text of an Explanation: plain lines that read well in a terminal and in an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...collectives.trace import Event
from .report import Axes, Explanation, Traced, Unit


def text(said: Explanation) -> str:
    """Write an explanation for a person."""
    blocks = [_head(said), _mesh(said), _communicators(said), _bytes(said)]
    blocks += [_step(step, said) for step in said.steps]
    blocks += [_beside(said)] if said.beside else []
    return "\n\n".join("\n".join(block) for block in blocks)


def size(count: int) -> str:
    """Write bytes with three or four digits, in powers of ten.

    >>> size(131072), size(8_064_000_000)
    ('131.1 kB', '8.06 GB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return (
                f"{count / scale:.1f} {unit}"
                if count >= 100 * scale
                else f"{count / scale:.2f} {unit}"
            )
    return f"{count} B"


def time(seconds: float) -> str:
    """Write a time with three digits.

    >>> time(4.25e-6), time(0.0213)
    ('4.25 us', '21.3 ms')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def ranges(numbers: Sequence[int]) -> str:
    """Write a set of numbers: ``0-2,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(str(n) for n in run) for run in runs)


def _head(said: Explanation) -> list[str]:
    where = f"{said.world_size:,} ranks, seen from rank {said.rank}"
    lines = [f"{said.plan or 'no axis'}: {said.model} in {said.dtype} on {where}"]
    if said.hardware:
        lines.append(
            f"seconds are predicted for {said.hardware}, each collective alone (plait plan --list; --hardware)"
        )
    lines += [f"not in the numbers below: {part}" for part in said.left_out]
    return lines + [f"note: {note}" for note in said.notes]


def _mesh(said: Explanation) -> list[str]:
    return [
        f"attention: {_formula(said.attention, said)}",
        f"experts:   {_formula(said.experts, said)}",
        said.picture,
    ]


def _formula(axes: Axes, said: Explanation) -> str:
    names = {"cp": "kvp"} if "kvp" in said.plan else {}
    sizes = " ".join(f"{names.get(axis, axis)}{count}" for axis, count in axes)
    inner = ""
    for axis, count in reversed(axes):
        if count > 1:
            outer = (
                f" + {count} * ({inner})"
                if " " in inner
                else f" + {count} * {inner}"
                if inner
                else ""
            )
            inner = names.get(axis, axis) + outer
    return f"{sizes}; rank = {inner or '0'}"


def _communicators(said: Explanation) -> list[str]:
    lines = [f"communicators made on this rank: {len(said.communicators)}"]
    for group in said.communicators:
        some = ", ".join(str(rank) for rank in group.ranks[:8])
        more = f", ... {group.ranks[-1]}" if len(group.ranks) > 8 else ""
        lines.append(f"  {' = '.join(group.axes):<16} {len(group.ranks):>4} ranks  {some}{more}")
    return lines


def _bytes(said: Explanation) -> list[str]:
    held = said.weights
    same = held.least == held.most
    spread = (
        "the same on all ranks"
        if same
        else f"{size(held.least)} to {size(held.most)} over the ranks"
    )
    times = f"{held.copy_total / max(1, held.whole):.2f} x the model's {size(held.whole)}"
    rows = [(held.bytes, "weights", f"{spread}; the ranks of one copy hold {times}")]
    if said.kv is not None:
        rows += [
            (said.kv.bytes_per_1024, "KV", "of 1024 tokens of one request"),
            (said.kv.request_bytes, "KV", f"of one request of {said.context:,} tokens"),
            (said.kv.batch_bytes, "KV", f"of {said.batch} of them"),
        ]
    for step in said.steps:
        made = "activations and gradients" if step.name == "training" else "activations"
        rows.append(
            (step.workspace_bytes, "workspace", f"of {step.name}: the most {made} alive at once")
        )
        if step.movable_bytes:
            moved = "of it go out and come back with plait.offload_activations"
            rows.append((step.movable_bytes, "saved", moved))
    if said.kv is not None:
        total = held.bytes + said.kv.batch_bytes + said.step("decode").workspace_bytes
        rows.append((total, "in all", f"for decoding {said.batch} of them"))
    lines = [f"  {what:<10} {size(count):>9}  {of}" for count, what, of in rows]
    return [f"bytes on rank {said.rank}", *lines]


def _title(step: Traced, context: int) -> str:
    match step.name:
        case "decode":
            return f"decode: {step.batch} requests, 1 new token each, {context:,} cached"
        case "prefill":
            return f"prefill: 1 request of {step.tokens:,} tokens, logits of the last"
    return f"{step.name}: forward and backward of {step.batch} x {step.tokens:,} tokens, all logits"


def _step(step: Traced, said: Explanation) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("", "op", "axis", "ranks", "dtype", "shape", "payload", "sent", "takes")
    ]
    summaries: list[str] = []
    for unit in step.units():
        if unit.numbers:
            label = f"{unit.path.rpartition('.')[2]} {ranges(unit.numbers)} (x{unit.times})"
            rows.append((label,))
            rows += [_row(f"  {event.scope}", event) for event in unit.events]
            summaries.append(_per_layer(unit))
        else:
            rows += [_row(unit.path or "input check", event) for event in unit.events]
    count = len(step.events)
    total = f"  per step:  {count} collectives, this rank sends {size(step.sent_bytes)}, {time(step.seconds)}"
    return [_title(step, said.context), *_table(rows), *summaries, total]


def _beside(said: Explanation) -> list[str]:
    """Group what has no run: the same events of one place, or of one layer after another, in one line."""
    rows: list[tuple[str, ...]] = [("", "op", "axis", "ranks", "times", "payload", "sent")]
    groups: dict[tuple[str, ...], list[Event]] = {}
    for event in said.beside:
        place = re.sub(r"\.\d+$", ".*", event.scope)
        key = place, event.op, event.axis, str(event.ranks), size(event.payload_bytes)
        groups.setdefault(key, []).append(event)
    for (place, op, axis, ranks, payload), events in groups.items():
        sent = size(sum(event.sent_bytes for event in events))
        rows.append((place or "the rest", op, axis, ranks, str(len(events)), payload, sent))
    total = size(sum(event.sent_bytes for event in said.beside))
    return ["training, beside the above, by formula", *_table(rows), f"  sends {total}"]


def _per_layer(unit: Unit) -> str:
    ops: dict[str, int] = {}
    for event in unit.events:
        key = f"{event.op} over {event.axis}"
        ops[key] = ops.get(key, 0) + 1
    said = ", ".join(f"{n} {op}" for op, n in ops.items())
    sent = size(sum(event.sent_bytes for event in unit.events))
    return (
        f"  per layer: {said}; sends {sent}, {time(unit.seconds)} (layers {ranges(unit.numbers)})"
    )


def _row(where: str, event: Event) -> tuple[str, ...]:
    shape = "x".join(str(n) for n in event.shape)
    return (
        where, event.op, event.axis, str(event.ranks), event.dtype, shape,
        size(event.payload_bytes), size(event.sent_bytes), time(event.seconds),
    )  # fmt: skip


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    right = {3, 6, 7, 8} if len(widths) > 7 else {3, 4, 5, 6}
    lines = []
    for row in rows:
        cells = [
            c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(row)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
