"""What goes with what: codecs and selectors of a compressed store, read or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listing

from ..select.selector import Selector
from ..spec import KVSpec
from .choice import ModelFacts
from .coder import PageCoder
from .compression import Compression, CompressionError
from .scorers import Scorer
from .tiers import Tiers


def check_facts(what: Listing[Compression | None], facts: ModelFacts) -> None:
    """Refuse scorers that must know more of the model than is said.

    Raises:
        CompressionError: saying what.
    """
    for own in what:
        missing = own and own.scorer.unmet(facts.rotary is not None, len(facts.outputs), len(what))
        if own is not None and missing:
            raise CompressionError(
                f"{own} needs {missing}, which this store does not know; give facts=facts_of(model), make it by "
                "compressed_store, or use another scorer such as snapkv or keydiff"
            )


def page_coder(
    spec: KVSpec, codec: str | Tiers | None, what: Listing[Compression | None], selector: Selector | None
) -> PageCoder | None:  # fmt: skip
    """What codes pages; refuse what does not go with it.

    Raises:
        CompressionError: saying why.
    """
    if codec is None:
        return None
    tiers = Tiers.parse(codec) if isinstance(codec, str) else codec
    tiers.check(spec)
    together = tiers.together(spec)
    if selector is not None and together is not None:
        raise CompressionError(
            f"selector={selector} with codec={tiers}: pages that {together} coded together cannot be decoded apart, so "
            "choosing among them saves nothing; use no selector, or codecs such as int8, int4, kivi, turbo and mxfp4"
        )
    for own in what:
        if own is not None and own.scorer.waits:
            raise CompressionError(
                f"{own} chooses after the text was repeated, and pages are coded as they come; use one of the two"
            )
        if own is not None and own.cadence:
            raise CompressionError(
                f"{own} chooses again while decoding, and coded pages are not written again; use every=0"
            )
        if tiers.shares is None and (own is None or not own.rule.by_loss):
            raise CompressionError(
                f"codec={tiers} says no shares, and {own or 'a layer without scorer'} does not either; "
                "use rule=waterfill, or give each tier but the last its @share"
            )
        if own is not None and own.rule.by_loss and tiers.shares is not None and tiers.ranked:
            raise CompressionError(
                f"{own} says what each tier holds, and codec={tiers} too; leave out the shares"
            )
        if own is not None and own.rule.by_loss and tiers.of_layer(0, spec.layers) != tiers:
            raise CompressionError(
                f"{own} spends bits within a layer, and codec={tiers} has each layer's own; use one of the two"
            )
        if own is None and tiers.ranked:
            raise CompressionError(
                f"codec={tiers} ranks tokens, and a layer without scorer has no ranks; give it one, or a single codec"
            )
    return PageCoder(tiers, spec)


def selector_of(given: str | Selector, kinds: list[Scorer]) -> Selector:
    """Read a selector, or refuse one that does not go with what evicts.

    Raises:
        CompressionError: saying why.
    """
    # Not at the top of the file: one of the selectors scores prompts by a scorer of ours.
    from ..select.registry import find_selector

    selector = find_selector(given)
    if selector.across_layers:
        raise CompressionError(
            f"selector={selector} lets layers read what another layer chose, and layers that evict do "
            "not hold the same tokens; use a selector of single layers such as rocket or quest, or a KVStore"
        )
    if selector.queries(1 << 40):
        raise CompressionError(
            f"selector={selector} filters prompts that are kept whole; with a scorer use "
            "selector=rocket, or use a KVStore"
        )
    heard = [kind for kind in kinds if kind.received]
    if heard:
        raise CompressionError(
            f"selector={selector} with {heard[0]}: it counts the attention that every token receives, and a "
            "selector reads only some; use another scorer, or no selector"
        )
    return selector


def checked_windows(layers: int, windows: Mapping[int, int] | None) -> dict[int, int]:
    """Give how many of the newest tokens rows of some layers see.

    Raises:
        ValueError: if a layer is not there, or sees nothing.
    """
    for number, window in (windows or {}).items():
        if not 0 <= number < layers or window < 1:
            raise ValueError(
                f"windows={{{number}: {window}}}: layers are in [0, {layers}) and see at least 1 token"
            )
    return dict(windows or {})
