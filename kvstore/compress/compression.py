"""What a compressed store keeps of a layer: a scorer, how much, spread by which rule, and when again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..named import pieces
from .budgets import Budget, Uniform
from .registry import find_budget, find_scorer
from .scorers import Scorer

OWN = ("budget", "rule", "every")  # options of the composition, among those of the scorer


class CompressionError(ValueError):
    """A composition that cannot be, and why."""


@dataclass(frozen=True)
class Compression:
    """A scorer with a budget. As text: `"snapkv:window=32,budget=0.25,rule=(ada:floor=0.3)"`.

    Args:
        scorer: which tokens matter.
        budget: what a head keeps on average: a share of the text up to the end of its last prompt (a float in
            (0, 1]), or a number of tokens (an int, from 1). More than there is keeps all.
        rule: spreads it over heads and layers.
        every: choose again after so many tokens that were decoded; 0: after prompts only. Default the scorer's.

    Raises:
        CompressionError: if the parts do not go together.
    """

    scorer: Scorer
    budget: float | int = 0.25
    rule: Budget = field(default_factory=Uniform)
    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is None:
            object.__setattr__(self, "every", self.scorer.every)
        share = isinstance(self.budget, float)
        if not (0 < self.budget <= 1 if share else self.budget >= 1):
            raise CompressionError(
                f"budget={self.budget} keeps nothing; give a share in (0, 1] such as 0.25, or tokens "
                "of each head, a whole number from 1"
                if self.budget <= 0
                else f"budget={self.budget} is more than all; give a share in (0, 1], or a whole number of tokens"
            )
        if self.cadence < 0:
            raise CompressionError(f"every={self.every} must be at least 0 tokens")
        if self.cadence and self.scorer.prompts_only:
            raise CompressionError(
                f"every={self.every}: {self.scorer} scores by every query of a text, which nobody keeps; use "
                "every=0, or a scorer that decodes such as h2o, tova, streaming, snapkv, knorm, keydiff"
            )
        if self.cadence and self.scorer.waits:
            raise CompressionError(
                f"every={self.every}: {self.scorer.name} scores a text by repeating it, not while decoding; use every=0"
            )
        if self.scorer.joint and self.rule.by_head:
            raise CompressionError(
                f"rule={self.rule} gives heads numbers of their own, and {self.scorer.name} keeps the same tokens in "
                "all heads of a layer; use rule=uniform or rule=pyramid"
            )
        if self.rule.by_loss and not self.scorer.attends:
            raise CompressionError(
                f"rule={self.rule} asks what losing a token costs, and {self.scorer} does not score by attention; use "
                "snapkv, h2o, kvzip or expected:norm=False, or rule=ada"
            )

    @classmethod
    def parse(cls, text: str) -> Compression:
        """Read the text form.

        Raises:
            ValueError: naming what there is.
        """
        name, _, rest = text.strip().partition(":")
        given = [piece.partition("=") for piece in pieces(rest)]
        own = {key: value for key, _, value in given if key in OWN}
        left = ",".join(key + equals + value for key, equals, value in given if key not in OWN)
        made: dict[str, object] = {}
        for key, value in own.items():
            try:
                if key == "rule":
                    made[key] = find_budget(value.removeprefix("(").removesuffix(")"))
                else:
                    whole = key == "every" or value.lstrip("+-").isdecimal()
                    made[key] = int(value) if whole else float(value)
            except ValueError as error:
                raise ValueError(f"scorer {text!r}: {key}={value!r}: {error}") from error
        return cls(find_scorer(name + (":" + left if left else "")), **made)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = str(self.scorer)
        rule = f"({self.rule})" if ":" in str(self.rule) else str(self.rule)
        own = [f"budget={self.budget}"]
        own += [f"rule={rule}"] if self.rule != Uniform() else []
        own += [f"every={self.every}"] if self.every != self.scorer.every else []
        return text + ("," if ":" in text else ":") + ",".join(own)

    @property
    def cadence(self) -> int:
        """Decoded tokens after which it chooses again; 0: never."""
        return self.every or 0

    def hears(self, listens: bool, prompt: bool) -> bool:
        """Whether it wants to know the attention of a step's rows.

        Args:
            listens: the step is for those that wait; prompt: it has more than one row of some sequence.
        """
        return self.scorer.received and (
            listens if self.scorer.waits else prompt or self.cadence > 0
        )

    def keeps(self, prompt: int, text: int) -> int:
        """Tokens that a head keeps on average of a text; of a share, while decoding, as many as of its prompt."""
        if not isinstance(self.budget, float):
            return min(self.budget, text)
        return text if self.budget == 1 else min(max(int(prompt * self.budget), 1), text)


def by_layer(
    layers: int,
    scorer: str | Compression,
    special: Mapping[int, str | Compression | None] | None = None,
) -> tuple[Compression | None, ...]:
    """Say what each layer does; None keeps everything.

    Args:
        special: layers that do something else, such as `{0: None, 1: None}`.

    Raises:
        ValueError: if a layer is not there, or a text cannot be read.
    """
    out: list[Compression | None] = [read(scorer)] * layers
    for number, own in (special or {}).items():
        if not 0 <= number < layers:
            raise ValueError(f"layer {number} must be in [0, {layers})")
        out[number] = None if own is None else read(own)
    return tuple(out)


def read(given: str | Compression) -> Compression:
    """Read the text form, or give the given one."""
    return Compression.parse(given) if isinstance(given, str) else given
