"""What a plan changes in a transformers model besides its weights: steps, caches, masks, generation."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from ..collectives.primitive import message_device
from ..kvstore import KVSpec, KVStore
from .agreement import agree, announce, tensor_digest
from .attention.cache import HelixCache, refuse_cache
from .attention.helix import RUNNING, HelixLayer, HelixState, helix_attention
from .edits import AddHook, Edit, SetAttribute
from .errors import PlanError
from .families import decoder_layers
from .ranks import ModelRanks
from .shape import ModelShape

HELIX = "plait_helix"


def agreement_edits(model: Any, ranks: ModelRanks) -> list[Edit]:
    """Compare the ranks' inputs at every new prompt, and their random state at every ``generate``."""
    if ranks.size == 1:
        return []
    device = next(model.parameters()).device

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return
        if device.type == "meta":  # a run for its collectives: there are no values to compare
            announce(ranks.all)
            return
        named = (kwargs.get(n) for n in ("input_ids", "inputs_embeds", "attention_mask"))
        tensors = [*args, *named]
        digest = tensor_digest(*(t for t in tensors if isinstance(t, Tensor)))
        agree(ranks.all, {"input": digest}, None)

    original = model.generate if hasattr(model, "generate") else None

    def generate(_: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, with every rank drawing rank 0's random numbers."""
        share_random_state(ranks)
        assert original is not None
        return original(*args, **kwargs)

    edits: list[Edit] = [
        AddHook(lambda: model.register_forward_pre_hook(compare, with_kwargs=True))
    ]
    if original is not None:
        edits.append(SetAttribute(model, "generate", types.MethodType(generate, model)))
    return [
        *edits,
        SetAttribute(model, "save_pretrained", types.MethodType(saving(model, ranks), model)),
    ]


def saving(model: Any, ranks: ModelRanks) -> Callable[..., None]:
    """Make a ``save_pretrained`` for a cut model: what it writes is a plain checkpoint of the whole model."""
    original, config = model.save_pretrained, model.config

    def save_pretrained(self: Any, directory: Any, **options: Any) -> None:
        """Write the whole model as transformers does.

        Collective: all ranks of the model copy; an all-gather per cut parameter. The first rank writes.
        """
        whole: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks.index == 0:
                whole[name] = full
        failure: Exception | None = None
        private, self.config = self.config, config
        try:
            if ranks.index == 0:
                original(directory, state_dict=whole, **options)
        except Exception as error:
            failure = error
        finally:
            self.config = private
        agree(
            ranks.all, {}, failure
        )  # nobody goes on before the files are there, or knows why they are not

    return save_pretrained


def share_random_state(ranks: ModelRanks) -> None:
    """Give every rank the random state of the first, so that sampling draws the same tokens.

    Collective: all ranks of the model copy; one broadcast of the generator's state (5 KB).
    """
    if ranks.all is None:
        return
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if torch.cuda.is_available():
        generators.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    for read, write in generators:
        state = read().to(message_device(ranks.all))
        torch.distributed.broadcast(state, src=ranks.members[0], group=ranks.all)
        write(state.cpu())


class HelixBinding:
    """Makes a transformers decoder run Helix steps: one before each forward, its cache, masks and attention."""

    def __init__(
        self, model: Any, shape: ModelShape, state: HelixState, store: KVStore | None
    ) -> None:
        self.model, self.shape, self.state = model, shape, state
        self.base = model.base_model
        self.config = model.config.get_text_config(decoder=True)
        self.signature = inspect.signature(type(self.base).forward)
        _, layers = decoder_layers(model)
        self.attentions = [
            next(m for m in layer.modules() if hasattr(m, "layer_idx") and m is not layer)
            for layer in layers
        ]
        self.store = store
        self.step_cache: HelixCache | None = None

    def edits(self) -> list[Edit]:
        """Prepare all of it; nothing for a model of window layers only, whose caches are not cut."""
        if not self.state.layers:
            return []
        self._check_store()
        register()
        return [
            *self._config_edits(),
            AddHook(lambda: self.base.register_forward_pre_hook(self.begin, with_kwargs=True)),
            AddHook(lambda: self.base.register_forward_hook(self.end)),
            SetAttribute(self.model, "helix_cache", self.cache),
            SetAttribute(
                self.model,
                "_prepare_cache_for_generation",
                types.MethodType(self._prepare_cache(), self.model),
            ),
        ]

    def cache(self) -> HelixCache:
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
        return HelixCache(self.state, self.store, windows, layers)

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
        need, have = self.spec(), self.store.spec
        if replace(have, page_tokens=need.page_tokens) != need:
            raise PlanError(
                f"store of {have}",
                f"does not fit this rank, which keeps {need}",
                "make the store with that KVSpec",
            )

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Open the step of a forward; give it a cache if it wants one and has none."""
        given = self.signature.bind(module, *args, **kwargs)
        values = {**given.arguments.pop("kwargs", {}), **given.arguments}
        values.pop("self", None)
        tokens = (
            values.get("input_ids")
            if values.get("input_ids") is not None
            else values.get("inputs_embeds")
        )
        if tokens is None:
            return args, kwargs  # transformers raises its own error
        cache = values.get("past_key_values")
        use_cache = values.get("use_cache")
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = values["past_key_values"] = self.cache()
        if cache is not None and not isinstance(cache, HelixCache):
            refuse_cache(cache)
        batch, length = tokens.shape[:2]
        mask = padding_mask(values.get("attention_mask"))
        self.step_cache = cache
        if cache is None:
            new = None if mask is None or mask.all() else mask
            self.state.begin(batch, length, [0] * batch, new, None, tokens.device)
        else:
            cache.begin(batch, length, mask, tokens.device)
        if any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values()):
            values[RUNNING] = (self.state.step, cache)
        return (), values

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Commit the step of a forward that returned."""
        if self.step_cache is not None:
            self.step_cache.end()
        self.step_cache = None

    def _prepare_cache(self) -> Callable[..., None]:
        def prepare(
            _: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> None:
            given = model_kwargs.get("past_key_values")
            if given is not None and not isinstance(given, HelixCache):
                refuse_cache(given)
            if generation_config.cache_implementation not in {None, "dynamic"}:
                raise PlanError(
                    f"cache_implementation={generation_config.cache_implementation!r}",
                    "cannot hold keys and values cut over kvp ranks",
                    "leave it out; under Helix the cache is paged",
                )
            if given is None and generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = cache = self.cache()
                if getattr(generation_config, "is_assistant", False):
                    cache.activate_past_recording()

        return prepare

    def _config_edits(self) -> list[Edit]:
        """Give the model a private config that names our attention; window layers keep the original."""
        original = self.config._attn_implementation
        private = copy.deepcopy(self.model.config)
        text = private.get_text_config(decoder=True)
        text._attn_implementation = HELIX
        text._plait_attention = original
        windowed = {
            id(m)
            for i, m in enumerate(self.attentions)
            if self.shape.window_layers and self.shape.window_layers[i]
        }
        edits: list[Edit] = []
        for module in self.model.modules():
            own = vars(module).get("config")
            if own is None or id(module) in windowed:
                continue
            if own is self.model.config:
                edits.append(SetAttribute(module, "config", private))
            elif own is self.config:
                edits.append(SetAttribute(module, "config", text))
            elif own is not private and hasattr(module, "_plait_counts"):
                own._attn_implementation = HELIX
        return edits


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


def register() -> None:
    """Register our attention and mask with transformers' registries; again is harmless."""
    AttentionInterface.register(HELIX, helix_attention)
    AttentionMaskInterface.register(HELIX, helix_mask)


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
        "use kvp=1 for packed or custom masks",
    )
