"""How a transformers decoder runs Helix steps: its cache, masks, attention and generation."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from ...kvstore import CompressedStore, KVSpec, KVStore
from ...kvstore.compress import Shard
from ..arguments import forward_signature, named_arguments
from ..edits import AddHook, Edit, SetAttribute
from ..errors import PlanError
from ..families import decoder_layers
from ..shape import ModelShape
from .cache import PagedCache, refuse_cache
from .helix import RUNNING, HelixLayer, HelixState, helix_attention

HELIX = "plait_helix"


class CacheBinding:
    """Makes a transformers decoder run Helix steps: one before each forward, its cache, masks and attention."""

    attention = HELIX
    hands_down = True  # recomputation in backward must find the step of its own forward

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        state: HelixState,
        store: KVStore | CompressedStore | None,
    ) -> None:
        self.model, self.shape, self.state = model, shape, state
        self.base = model.base_model
        self.config = model.config.get_text_config(decoder=True)
        _, layers = decoder_layers(model)
        self.attentions = [
            next(m for m in layer.modules() if hasattr(m, "layer_idx") and m is not layer)
            for layer in layers
        ]
        self.store = store
        self.step_cache: PagedCache | None = None

    def edits(self) -> list[Edit]:
        """Prepare all of it; nothing for a model of window layers only, whose caches are not cut."""
        if not self.state.layers and self.store is not None:
            raise PlanError(
                f"a store for {type(self.model).__name__}",
                f"has nothing to hold: every layer sees a window of {self.shape.window} tokens and keeps its own cache",
                "leave the store out, or make the model with sliding_window=None",
            )
        if not self.state.layers:
            return []
        self._check_store()
        self.register()
        return [
            *self._config_edits(),
            AddHook(lambda: self.base.register_forward_pre_hook(self.begin, with_kwargs=True)),
            AddHook(lambda: self.base.register_forward_hook(self.end)),
            SetAttribute(self.model, "kv_cache", self.cache),
            SetAttribute(
                self.model,
                "_prepare_cache_for_generation",
                types.MethodType(self._prepare_cache(), self.model),
            ),
        ]

    def cache(self) -> PagedCache:
        """Make an empty cache for this model, for callers who keep it themselves."""
        if self.store is None:
            self.store = KVStore(self.spec())
        windows = [
            self.shape.window if self.shape.window_layers and self.shape.window_layers[i] else None
            for i in range(len(self.attentions))
        ]
        layers: list[HelixLayer | None] = [
            getattr(m, "_plait_attention", None) for m in self.attentions
        ]
        return PagedCache(self.state, self.store, windows, layers)

    def register(self) -> None:
        """Register our attention and mask with transformers' registries; again is harmless."""
        AttentionInterface.register(HELIX, helix_attention)
        AttentionMaskInterface.register(HELIX, helix_mask)

    def spec(self) -> KVSpec:
        """What one rank stores of one token."""
        layer = self.state.layers[0]
        weight = next(p for p in self.model.parameters() if p.is_floating_point())
        latent = self.shape.attention == "mla"
        return KVSpec(
            layers=len(self.state.layers),
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
            shared_kv=latent,
            page_tokens=16,
            dtype=weight.dtype,
            device=str(weight.device),
        )

    def _check_store(self) -> None:
        """Refuse a given store that cannot hold this rank's keys and values."""
        if self.store is None:
            return
        if isinstance(self.store, CompressedStore):
            self._join(self.store)
        need, have = self.spec(), self.store.spec
        if replace(have, page_tokens=need.page_tokens) != need:
            raise PlanError(
                f"store of {have}",
                f"does not fit this rank, which keeps {need}",
                "make the store with that KVSpec",
            )

    def _join(self, store: CompressedStore) -> None:
        """Let a compressed store keep on this rank what one process would keep of it."""
        ranks = self.state.ranks
        if ranks.plan.cp.size > 1:
            raise PlanError(
                "a CompressedStore with cp", "chooses right after a prompt's attention, which cp computes elsewhere",
                "use kvp or tp alone",
            )  # fmt: skip
        store.join(Shard(self.state.rule, ranks.kvp_group, ranks.groups.group("tp")))

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Open the step of a forward; give it a cache if it wants one and has none."""
        self.step_cache = None  # a forward that raised has left it
        values = named_arguments(module, args, kwargs)
        tokens = values.get("input_ids")
        tokens = values.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return args, kwargs  # transformers raises its own error
        use_cache = values.get("use_cache")
        wanted = self.config.use_cache if use_cache is None else use_cache
        if not self.takes(values, wanted):
            return args, kwargs
        cache = values.get("past_key_values")
        if cache is None and wanted:
            cache = values["past_key_values"] = self.cache()
        self.open(tokens, cache, padding_mask(values.get("attention_mask")))
        if self.hands_down and any(
            p.kind is p.VAR_KEYWORD for p in forward_signature(type(module)).parameters.values()
        ):
            values[RUNNING] = (self.state.step, cache)
        return (), values

    def takes(self, values: dict[str, Any], wants_cache: bool) -> bool:
        """Decide whether this forward is a step of ours; under Helix every one is."""
        cache = values.get("past_key_values")
        if cache is not None and not isinstance(cache, PagedCache):
            refuse_cache(cache)
        return True

    def open(self, tokens: Tensor, cache: PagedCache | None, mask: np.ndarray | None) -> None:
        """Begin the step of these new tokens."""
        batch, length = tokens.shape[:2]
        self.step_cache = cache
        if cache is None:
            new = None if mask is None or mask.all() else mask
            self.state.begin(batch, length, [0] * batch, new, None, tokens.device)
        else:
            cache.begin(batch, length, mask, tokens.device)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Commit the step of a forward that returned."""
        if self.step_cache is not None:
            self.step_cache.end()
        self.step_cache = None

    def _prepare_cache(self) -> Callable[..., None]:
        original = self.model._prepare_cache_for_generation

        def prepare(
            _: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> None:
            given = model_kwargs.get("past_key_values")
            if not self.generates(given, generation_config):
                original(generation_config, model_kwargs, *args, **kwargs)
            elif given is None and generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = cache = self.cache()
                if getattr(generation_config, "is_assistant", False):
                    cache.activate_past_recording()

        return prepare

    def generates(self, given: Any, generation_config: Any) -> bool:
        """Decide whether ``generate`` runs on our cache; under Helix it must."""
        if given is not None and not isinstance(given, PagedCache):
            refuse_cache(given)
        if generation_config.cache_implementation not in {None, "dynamic"}:
            raise PlanError(
                f"cache_implementation={generation_config.cache_implementation!r}",
                "cannot hold keys and values cut over kvp ranks",
                "leave it out; under Helix the cache is paged",
            )
        return True

    def _config_edits(self) -> list[Edit]:
        """Give the model a private config that names our masks, and its attention modules one that names our attention.

        Sliding-window layers keep the original.
        """
        private = copy.deepcopy(self.model.config)
        self.private = private.get_text_config(decoder=True)
        self.private._plait_attention = self.config._attn_implementation
        inner = copy.copy(self.private)
        inner._attn_implementation = self.attention
        self.private._attn_implementation = self.masks_at_rest
        windows = self.shape.window_layers
        ours = {id(m) for i, m in enumerate(self.attentions) if not (windows and windows[i])}
        alone = {id(m) for m in self.attentions} - ours
        edits: list[Edit] = []
        for module in self.model.modules():
            own = vars(module).get("config")
            if own is None or id(module) in alone:
                continue
            if id(module) in ours:
                edits.append(SetAttribute(module, "config", inner))
            elif own is self.model.config:
                edits.append(SetAttribute(module, "config", private))
            elif own is self.config:
                edits.append(SetAttribute(module, "config", self.private))
        return edits

    @property
    def masks_at_rest(self) -> str:
        """The attention that masks are made for outside a forward."""
        return self.attention


def padding_mask(mask: Any) -> np.ndarray | None:
    """Read a 2-D padding mask; refuse what cannot be cut over ranks."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PlanError(
            f"an attention_mask of {type(mask).__name__ if not isinstance(mask, Tensor) else f'{mask.dim()} dims'}",
            "is not known to be causal, and Helix bounds each query by its position",
            "give a 2-D padding mask [batch, columns]",
        )
    if mask.device.type == "meta":
        return None
    return mask.to(torch.bool).cpu().numpy()


def helix_mask(
    *args: Any, mask_function: Any = causal_mask_function, config: Any = None, **kwargs: Any
) -> Any:
    """Make no mask for Helix layers, whose bounds come from positions, and the original one for window layers."""
    if mask_function is causal_mask_function:
        return None
    if kwargs.get("local_size") is not None:
        original = ALL_MASK_ATTENTION_FUNCTIONS[config._plait_attention]
        return original(*args, mask_function=mask_function, config=config, **kwargs)
    raise PlanError(
        "a mask other than causal and padding",
        "is not known to Helix attention",
        "use kvp=1 and a DynamicCache for packed or custom masks",
    )
