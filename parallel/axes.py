"""The choices of each axis. A choice is an object that knows its size, options and legality.

``Plan`` holds one choice per axis; an integer stands for the first class listed for the axis in
``AXES``. Sizes and options are checked when a choice is made; what depends on other axes or on the
model is checked by `Choice.validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .choice import Choice, Problem, file_name, one_of, whole
from .errors import PlanError, listed
from .expert_choice import Experts, Fssdp

if TYPE_CHECKING:
    from .plan import Plan
    from .shape import ModelShape

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


@dataclass(frozen=True, slots=True)
class Replicate(Choice):
    """Plain data parallelism: every dp rank holds all parameters. ``dp2``."""

    size: int
    axis: ClassVar[str] = "dp"
    kind: ClassVar[str] = "replicate"

    def __post_init__(self) -> None:
        whole("dp", self.size)


@dataclass(frozen=True, slots=True)
class Shard(Choice):
    """Fully sharded data parallelism: parameters are cut over dp between uses. ``dp2:shard,param_dtype=bf16``.

    Args:
        param_dtype: what parameters are gathered and used in; gradients are reduced in the model's own dtype, which
            the sharded parameters keep.
    """

    size: int
    _: KW_ONLY
    param_dtype: str = "model"
    axis: ClassVar[str] = "dp"
    kind: ClassVar[str] = "shard"

    def __post_init__(self) -> None:
        whole("dp", self.size)
        one_of("param_dtype", self.param_dtype, ("model", "bf16", "fp16"))

    @property
    def word(self) -> str:
        return "shard"


def heads_problem(ulysses: int, plan: Plan, shape: ModelShape) -> Problem | None:
    """Say why so many ranks cannot share the query heads of a tp rank, or None."""
    if shape.heads is None or ulysses == 1 or shape.heads % (ulysses * plan.tp.size) == 0:
        return None
    said = "(ulysses)" if ulysses == plan.cp.size else f"with ulysses={ulysses}"
    return f"{said} * tp={plan.tp.size} does not divide heads={shape.heads}", ""


@dataclass(frozen=True, slots=True)
class Ring(Choice):
    """Ring attention: K and V travel around cp. ``cp4:ring``, ``cp8:ring,ulysses=2``.

    Args:
        ulysses: ranks that share one place of the ring and exchange heads for tokens inside it.
    """

    size: int
    _: KW_ONLY
    ulysses: int = 1
    axis: ClassVar[str] = "cp"
    kind: ClassVar[str] = "ring"

    def __post_init__(self) -> None:
        whole("cp", self.size)
        whole("ulysses", self.ulysses)

    @property
    def word(self) -> str:
        return "ring"

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        if self.size % self.ulysses:
            legal = listed(n for n in range(1, self.size + 1) if self.size % n == 0)
            return f"(ring) is not a multiple of ulysses={self.ulysses}", f"use ulysses in {legal}"
        return heads_problem(self.ulysses, plan, shape)


@dataclass(frozen=True, slots=True)
class Ulysses(Choice):
    """Ulysses attention: heads and sequence change places over cp. ``cp4:ulysses``."""

    size: int
    axis: ClassVar[str] = "cp"
    kind: ClassVar[str] = "ulysses"

    def __post_init__(self) -> None:
        whole("cp", self.size)

    @property
    def word(self) -> str:
        return "ulysses"

    @property
    def ulysses(self) -> int:
        """Ranks that exchange heads for tokens: all of them."""
        return self.size

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        return heads_problem(self.size, plan, shape)


@dataclass(frozen=True, slots=True)
class Helix(Choice):
    """Helix decode: the KV cache is cut along the sequence over kvp. ``kvp4,interleave=16``.

    Args:
        interleave: tokens in a row on one rank before the next rank's turn.
        chunks: HOP-B: cut the batch into so many chunks, each one's exchange behind the next one's attention; 1 means
            no overlap, ``auto`` what the first steps' times say.
        exchange: what crosses the wire: ``partials``, ``kv``, or ``auto`` (the fewer bytes).
        mla: exchange MLA partials before (``latent``) or after (``value``) W_UV.
    """

    size: int
    _: KW_ONLY
    interleave: int = 16
    chunks: int | str = "auto"
    exchange: str = "auto"
    mla: str = "latent"
    axis: ClassVar[str] = "kvp"
    kind: ClassVar[str] = "helix"

    def __post_init__(self) -> None:
        whole("kvp", self.size)
        whole("interleave", self.interleave)
        if self.chunks != "auto":
            whole("chunks", self.chunks)
        one_of("exchange", self.exchange, ("auto", "partials", "kv"))
        one_of("mla", self.mla, ("latent", "value"))

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        if self.size == 1 or shape.heads is None or shape.heads % (self.size * plan.tp.size) == 0:
            return None
        runs = f"{self.size} * {plan.tp.size} = {self.size * plan.tp.size}"
        because = f"with tp={plan.tp.size} needs {runs} equal runs of heads={shape.heads}"
        return because, ""


@dataclass(frozen=True, slots=True)
class Tensor(Choice):
    """Tensor parallelism. ``tp2``, ``tp2:sp``, ``tp8,replicate_kv=true``.

    Args:
        sp: cut norms and residuals along the sequence over tp (Megatron's sequence parallelism).
        replicate_kv: allow tp beyond kv_heads by copying each KV head to tp / kv_heads ranks.
        fuse: do all-reduce, residual add and norm as one step where nothing is recorded for a backward.
        weave: cut the tokens of a prefill or a training batch into so many pieces, whose sums travel behind each
            other's MLP (TokenWeave).
    """

    size: int
    _: KW_ONLY
    sp: bool = False
    replicate_kv: bool = False
    fuse: bool = True
    weave: int = 1
    axis: ClassVar[str] = "tp"
    kind: ClassVar[str] = "tensor"
    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sp": {"sp": True}}

    def __post_init__(self) -> None:
        whole("tp", self.size)
        for name in ("sp", "replicate_kv", "fuse"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise PlanError(f"{name}={value!r}", "is not true or false", f"use {name}=True")
        whole("weave", self.weave)
        if self.weave > 1 and (self.sp or not self.fuse):
            raise PlanError(
                f"weave={self.weave}",
                "is done where sums wait for the residual stream, which needs fuse=true and no sp",
                f"write tp{self.size},weave={self.weave}",
            )

    @property
    def word(self) -> str:
        return "sp" if self.sp else ""

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        if self.sp and plan.kvp.size > 1:
            why = (
                f"with sp cuts norms along the sequence, which kvp={plan.kvp.size} does not do yet"
            )
            return why, f"write tp{self.size} without sp, or kvp1"
        because = self._kv_problem(plan, shape)
        if because is None and shape.heads is not None and shape.heads % self.size:
            because = f"does not divide heads={shape.heads}"
        return None if because is None else (because, "")

    def _kv_problem(self, plan: Plan, shape: ModelShape) -> str | None:
        helix, kv_heads = plan.kvp.size > 1, shape.kv_heads
        if shape.attention == "mla":
            if helix and self.size > 1:
                return f"with kvp={plan.kvp.size} exceeds the one latent KV head that MLA caches"
            return None
        if kv_heads is None or kv_heads % self.size == 0:
            return None
        if helix and self.replicate_kv:
            return f"does not divide kv_heads={kv_heads}, and kvp has no replicate_kv"
        if not self.replicate_kv:
            return f"does not divide kv_heads={kv_heads}"
        if self.size % kv_heads:
            return f"with replicate_kv neither divides nor is a multiple of kv_heads={kv_heads}"
        return None


@dataclass(frozen=True, slots=True)
class Pipeline(Choice):
    """Pipeline parallelism over layers. ``pp2:1f1b,microbatches=8``, ``pp4,times=times.json``.

    Args:
        times: a file of how long each layer takes, by which stages are balanced (`plait.measure_layers` makes it);
            none: by parameters.
    """

    size: int
    _: KW_ONLY
    schedule: str = "1f1b"
    microbatches: int | None = None
    times: str = ""
    axis: ClassVar[str] = "pp"
    kind: ClassVar[str] = "pipeline"
    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {s: {"schedule": s} for s in SCHEDULES}

    def __post_init__(self) -> None:
        whole("pp", self.size)
        one_of("schedule", self.schedule, SCHEDULES)
        if self.microbatches is not None:
            whole("microbatches", self.microbatches)
        file_name("times", self.times)

    @property
    def word(self) -> str:
        return self.schedule

    @property
    def chunks_per_stage(self) -> int:
        """Runs of layers on each stage: two where the schedule interleaves."""
        return 2 if self.schedule == "interleaved" else 1

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        if shape.layers is not None and self.size > shape.layers:
            return f"is more stages than layers={shape.layers}", f"use pp <= {shape.layers}"
        few = self.microbatches is not None and self.microbatches < self.size
        if few and self.schedule == "1f1b":
            because = f"with 1f1b needs at least {self.size} microbatches, not {self.microbatches}"
            return because, f"use microbatches >= {self.size}, or schedule gpipe"
        rounds = (self.microbatches or self.size) // self.size
        if self.schedule in {"interleaved", "zero-bubble"} and rounds > 1:
            rest = (self.microbatches or self.size) % rounds
            if rest:
                because = f"with {self.schedule} takes microbatches in rounds of one size, not {self.microbatches}"
                return because, f"use microbatches={self.size * rounds}"
        return None


# Order of printing. The first class of an axis is what an integer means; none: integers only.
AXES: Mapping[str, tuple[type[Choice], ...]] = {
    "dp": (Replicate, Shard),
    "cp": (Ring, Ulysses),
    "kvp": (Helix,),
    "tp": (Tensor,),
    "ep": (Experts, Fssdp),
    "etp": (),
    "pp": (Pipeline,),
}


def normal(axis: str, value: object) -> Any:
    """Turn an integer into the axis' default choice, and refuse what is not of this axis."""
    known = AXES[axis]
    if isinstance(value, known):
        return value
    if isinstance(value, Choice):
        names = listed(kind.__name__ for kind in known) if known else "an int"
        asked = f"{axis}={type(value).__name__}({value.size})"
        raise PlanError(asked, f"is a choice of {value.axis}, not of {axis}", f"use {names}")
    whole(axis, value)
    return known[0](value) if known else value  # type: ignore[call-arg]
