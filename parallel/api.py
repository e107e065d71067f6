"""parallelize(model, plan): check, agree, prepare every change, then make them all; unparallelize undoes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..kvstore import CompressedStore, KVStore
from .agreement import agree, model_digest, structure
from .attention.helix import HelixState
from .checkpoint.weights import load
from .context.modules import Sequence
from .context.state import gradient_edits
from .data import data_edits
from .documents import digest
from .edits import CutParameter, Edit, Edits
from .errors import PlanError
from .experts import RoutedExperts, block_edits
from .families import is_transformers, roles_of
from .folding import Folding
from .groups import Groups
from .pipeline import Depart, Split, fetch, pipeline_edits, split_of
from .plain import refuse_compiled, refuse_hooks, refuse_shared
from .plan import Plan
from .ranks import ModelRanks
from .residual import stream_edits
from .roles import Role
from .rules import Rules, match, snippet
from .shape import ModelShape


@dataclass
class Parallelized:
    """What ``parallelize`` did to a model; kept at ``model._plait``."""

    plan: Plan
    ranks: ModelRanks
    shape: ModelShape
    edits: Edits
    split: Split | None = None

    def parameters(self) -> list[CutParameter]:
        """The parameters that were cut, with their layouts."""
        return self.edits.parameters()


def parallelize(
    model: nn.Module,
    plan: Plan | str,
    *,
    rules: Rules | None = None,
    weights: Any = None,
    store: KVStore | CompressedStore | None = None,
) -> nn.Module:
    """Cut a model over the ranks of a plan, in place, and return it.

    The forward keeps its signature and its outputs. Every rank of a model copy must call it with the same input; each
    copy along dp with its own, and gradients are the mean over dp. Make the optimizer afterwards: the parameters are
    new. Undo with ``unparallelize``.

    Args:
        model: any ``torch.nn.Module``; a transformers decoder is recognised, others need ``rules``.
        plan: a ``Plan`` or its text, e.g. ``"kvp2 tp2"``; or ``"auto"``: the planner's choice for this world.
        rules: module-path pattern -> role (``"colwise"``, ``"rowwise"``, ``Attention(...)``...).
        weights: a directory or files of safetensors; each rank reads only its slices. Needed for a meta model.
        store: where Helix keeps keys and values; made when needed by default.

    Collective: all ranks of the world; two all-gathers of 4 KiB, whatever happens.

    Raises:
        PlanError: the plan does not fit the model, the world or another rank; the same on every rank, before anything
            is changed.
    """
    failure: Exception | None = None
    groups, prepared, placement, times = None, None, "", ""
    if isinstance(plan, str):
        plan = automatic(model) if plan == "auto" else Plan.parse(plan)
    try:
        refuse_empty(model, weights)
        groups = open_groups(model, plan, rules)
        placement, times = digest("placement", plan.ep.placement), digest("times", plan.pp.times)
    except Exception as error:
        failure = error
    world = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    facts = {
        "plan": str(plan),
        "model": "" if failure else model_digest(structure(model)),
        "rules": _rules_text(rules),
        "placement": placement,
        "times": times,
    }
    agree(world, facts, failure)
    assert groups is not None
    try:
        prepared = prepare(model, plan, groups, rules=rules, weights=weights, store=store)
    except Exception as error:
        failure = error
    agree(world, {}, failure)
    assert prepared is not None
    return commit(model, *prepared)


def open_groups(model: nn.Module, plan: Plan, rules: Rules | None) -> Groups:
    """Check everything that needs no communication, and open this rank's groups."""
    if getattr(model, "_plait", None) is not None:
        raise PlanError(
            "parallelize",
            f"was called before on this model ({model._plait.plan})",
            "call unparallelize(model) first",
        )
    if dist.is_initialized():
        plan.validate(shape_of(model), dist.get_world_size())
    else:
        plan.validate(shape_of(model))
    refuse_later_axes(plan, rules)
    return Groups.create(Folding.of(plan))


def automatic(model: nn.Module) -> Plan:
    """Let the planner choose for this model and world; the same on every rank, without asking them."""
    from .planner.auto import here

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return Plan()
    if not is_transformers(model):
        raise PlanError(
            'plan "auto"',
            f"needs a transformers model, whose config says its shape; this is {type(model).__name__}",
            'give a plan, e.g. "tp2"',
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    config: Any = model.config
    return here(config, ranks, device_name=device)


def refuse_empty(model: nn.Module, weights: Any) -> None:
    """Refuse a meta model without weights to fill it from."""
    if weights is None and any(p.device.type == "meta" for p in model.parameters()):
        raise PlanError(
            "parallelize",
            "was given a model on meta and no weights",
            "pass weights=, a directory with safetensors",
        )


def refuse_later_axes(plan: Plan, rules: Rules | None) -> None:
    """Refuse axes whose execution does not exist yet, rather than ignoring them."""
    if plan.pp.size > 1:
        refuse_beside_stages(plan, rules)
    if plan.kvp.size > 1 and plan.cp.ulysses > 1:
        raise PlanError(
            f"{plan.cp.text()} with kvp={plan.kvp.size}",
            "is not executed: a prefill that leaves keys where Helix wants them passes them around a ring",
            f"use cp{plan.kvp.size}:ring, or kvp alone",
        )
    whole = None if rules is None else rules.get("")
    by_rules = plan.cp.size > 1 and plan.kvp.size == 1 and rules is not None
    if by_rules and not isinstance(whole, Sequence):
        raise PlanError(
            f"cp={plan.cp.size} with rules",
            "needs to know which inputs hold the sequence that is to be cut",
            'add "": plait.Sequence(inputs=("ids",), attention=("blocks.*.attn",))',
        )
    if plan.tp.sp and rules:
        raise PlanError("tp:sp", "is executed for transformers decoders only", "use tp without :sp")


def refuse_beside_stages(plan: Plan, rules: Rules | None) -> None:
    """Refuse what is not exact together with pipeline stages, or not known to be."""
    shard, pp = plan.dp.kind == "shard", f"pp={plan.pp.size}"
    if rules is not None and plan.cp.size > 1 and plan.kvp.size == 1:
        raise PlanError(
            f"{pp} with cp={plan.cp.size} and rules",
            "would leave each rank the loss of its own part of the sequence",
            "use tp, dp or ep beside pp",
        )
    if shard and plan.pp.schedule == "zero-bubble":
        raise PlanError(
            f"{pp} with zero-bubble and dp:shard",
            "would scatter gradients too early: FSDP2 does so when those of a layer's inputs are there, and "
            "zero-bubble computes those of its weights later",
            "use schedule 1f1b or interleaved, or dp without shard",
        )


def prepare(
    model: nn.Module,
    plan: Plan,
    groups: Groups,
    *,
    rules: Rules | None = None,
    weights: Any = None,
    store: Any = None,
) -> tuple[list[Edit], Parallelized]:
    """Prepare every change to the model without touching it. Needs no communication but the making of groups."""
    shape = shape_of(model)
    ranks = ModelRanks.of(plan, groups)
    ranks = replace(ranks, attention=HelixState(ranks))
    split = split_of(model, plan.pp, rules) if plan.pp.size > 1 else None
    cuts = (
        ranks.size > 1
        or (split is not None and rules is not None)
        or plan.cuts_experts
        or (ranks.cp > 1 and rules is not None)
    )
    if cuts:
        refuse_compiled(model)
    roles = find_roles(model, shape, plan, rules) if cuts else {}
    refuse_shared(model, roles)
    if ranks.size == 1:  # a copy of one rank has nothing to cut but what other copies share with it
        between = (RoutedExperts, Sequence)
        roles = {path: role for path, role in roles.items() if isinstance(role, between)}
    stage, absent = groups.folding.coords(groups.rank)["pp"], set[int]()
    if split is not None:
        roles = {path: role for path, role in roles.items() if split.holds(path, stage)}
        absent = split.absent(model, stage)
    edits: list[Edit] = []
    for path, role in roles.items():
        edits += role.edits(model.get_submodule(path), path, ranks)
    edits += block_edits(model, ranks, edits)
    refuse_hooks(edits)
    edits += load(model, edits, ranks, weights, absent)
    if is_transformers(model) and plan.world_size > 1:
        edits = decoder_edits(model, shape, ranks, store, edits, split)
    elif ranks.inputs is not None:
        edits = own_module_edits(model, ranks, edits)
    edits += data_edits(model, ranks, edits)
    if split is not None:
        before, after = pipeline_edits(model, split, ranks)
        edits = [*before, *edits, *after]
    return edits, Parallelized(plan, ranks, shape, Edits(), split)


def own_module_edits(model: nn.Module, ranks: ModelRanks, roles: list[Edit]) -> list[Edit]:
    """All edits of a module of the user's own: those of the whole, and those of its roles in their place among them."""
    from .modules import module_edits

    last = gradient_edits(model, ranks.groups.group("cp"), roles) if ranks.cp > 1 else []
    return [*module_edits(model, ranks), *roles, *last]


def decoder_edits(
    model: nn.Module,
    shape: ModelShape,
    ranks: ModelRanks,
    store: Any,
    roles: list[Edit],
    split: Split | None,
) -> list[Edit]:
    """All edits of a transformers decoder: those of the model as a whole, and those of its roles in their place."""
    from .attention.binding import CacheBinding
    from .attention.paged import PagedBinding
    from .binding import agreement_edits
    from .context.binding import ContextBinding
    from .sequence import sequence_edits

    edits, last = agreement_edits(model, ranks), list[Edit]()
    stage = ranks.groups.folding.coords(ranks.groups.rank)["pp"]
    # what stages do not do yet: pages without kvp, fused sums
    alone = ranks.size > 1 and split is None
    if isinstance(store, CompressedStore) and (ranks.cp > 1 or not (ranks.kvp > 1 or alone)):
        raise PlanError(
            f"a CompressedStore under {ranks.plan}", "is read by no layer of this plan",
            "use kvp or tp without cp and pp; on one rank, plait.kvstore.engines.compressed.CompressedCache",
        )  # fmt: skip
    if alone:
        last += stream_edits(model, ranks, roles)
    if ranks.cp > 1:
        context = ContextBinding(model, shape, ranks)
        edits += context.edits()
        held = (lambda _: True) if split is None else partial(split.holds, stage=stage)
        last += gradient_edits(model, context.state.group, roles, held)
    elif ranks.kvp > 1 or alone:
        kind = CacheBinding if ranks.kvp > 1 else PagedBinding
        assert ranks.attention is not None
        edits += kind(model, shape, ranks.attention, store).edits()
    if ranks.span is not None:
        runs = () if split is None else split.runs_of(stage)
        edits += sequence_edits(model, ranks, roles, runs)
    return [*edits, *roles, *last]


def find_roles(
    model: nn.Module, shape: ModelShape, plan: Plan, rules: Rules | None
) -> dict[str, Role]:
    """Roles by rules, or from the tables the model ships."""
    if rules is not None:
        return match(model, rules)
    if is_transformers(model):
        return roles_of(model, shape, plan)
    raise PlanError(
        f"model {type(model).__name__}",
        "is not a transformers model and no rules were given",
        "give rules, for example:\n" + snippet(model),
    )


def commit(model: nn.Module, edits: list[Edit], done: Parallelized) -> nn.Module:
    """Make the prepared changes."""
    from .checkpoint.state_dict import state_dict_edits  # DTensor takes a while to import

    done.edits.apply(
        [
            *edits,
            *state_dict_edits(model, [e for e in edits if isinstance(e, CutParameter)], done.ranks),
        ]
    )
    # From here on the whole weights are gone; unparallelize gathers them.
    for edit in done.edits.done:
        if isinstance(edit, CutParameter):
            edit.whole = None
        elif isinstance(edit, Depart):
            edit.commit()
    model._plait = done  # type: ignore[assignment]
    return model


def unparallelize(model: nn.Module) -> nn.Module:
    """Gather the weights and undo every change; bitwise the weights the model had.

    Collective: all ranks of the model copy; one all-gather per cut parameter. Each rank then holds the whole model.
    """
    done: Parallelized | None = getattr(model, "_plait", None)
    if done is None:
        raise PlanError(
            "unparallelize", "finds no plan on this model", "call it on what parallelize returned"
        )
    done.edits.gather()
    made: dict[int, nn.Parameter] = {}
    gathered: dict[int, torch.Tensor] = {}
    for parameter in done.parameters():
        assert parameter.local is not None
        key = id(parameter.local)
        if key not in gathered:
            gathered[key] = gather_whole(parameter, done.ranks)
        parameter.restore(gathered[key], made)
    done.edits.undo()
    if done.split is not None:
        fetch(model, done.split, done.ranks)
    del model._plait
    done.ranks.groups.close()
    return model


def gather_whole(parameter: CutParameter, ranks: ModelRanks) -> torch.Tensor:
    """Put a cut parameter together on every rank.

    Collective: its holders; an all-gather padded to the largest part for each cut.
    """
    assert parameter.local is not None
    return parameter.join(parameter.local.detach(), ranks)


def shape_of(model: nn.Module) -> ModelShape:
    """The numbers of a model that legality needs; unknown for modules that are not transformers'."""
    return (
        ModelShape.from_config(model.config) if is_transformers(model) else ModelShape(experts=None)
    )


def _rules_text(rules: Rules | None) -> str:
    return ";".join(f"{pattern}:{role}" for pattern, role in (rules or {}).items())
