"""The role of routed experts: which parameters are cut over ep and which over etp."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from ..axes import Experts, Fssdp
from ..edits import Edit, SetAttribute, SumGradient, SwapClass
from ..errors import PlanError, listed
from ..layout import Cut
from ..ranks import ModelRanks, Placed
from ..roles import cut_parameter
from .capacity import Capacity
from .compute import Packed, is_packed
from .fssdp import Materialiser
from .layer import Compute, ExpertLayer, Listed, Local, OwnCode, Route, Routed
from .nodes import Nodes
from .place import Place
from .placement import Placement, read_placements


@dataclass(frozen=True)
class RoutedExperts:
    """Share routed experts out over ep, and each one's matrices over etp.

    The module is called as ``module(hidden, index, weights)``: [tokens, hidden], [tokens, top_k], [tokens, top_k]. It
    holds transformers' packed matrices, or stacks of one expert a row that its own code indexes, or a list of modules.
    A module that routes by itself needs ``route``.

    Args:
        route: ``route(module, hidden) -> (index, weights)``, for a whole block that is called as ``module(hidden)``.
        experts: where the list of modules is inside; found if there is one.
        local: path of a submodule that computes experts with higher numbers where tokens are, as `LocalExperts` does.
        count: the attribute in which the module's own code finds the number of stacked experts.
    """

    route: Route | None = field(default=None, repr=False)  # its address differs between ranks
    experts: str | None = None
    local: str | None = None
    count: str = "num_experts"

    def edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        if not ranks.plan.cuts_experts:
            return []  # every rank holds and computes every expert
        listed = self._listed(module)
        if listed is not None:
            return self._listed_edits(module, path, ranks, listed)
        if is_packed(module):
            return self._packed_edits(module, path, ranks)
        return self._own_edits(module, path, ranks)

    def _listed(self, module: nn.Module) -> str | None:
        """Path of the list of experts inside the module; "" if the module is the list."""
        if self.experts is not None:
            return self.experts
        lists = (nn.ModuleList, nn.ModuleDict)
        if isinstance(module, lists):
            return ""
        found = [n for n, m in module.named_children() if isinstance(m, lists) and len(m) > 1]
        return found[0] if len(found) == 1 else None

    def _packed_edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        packed = Packed.of(module)
        up, down = module.get_parameter(packed.up), module.get_parameter("down_proj")
        place = self._place(up.shape[0], path, ranks)
        if place.etp > 1 and getattr(module, "has_post_expert_norm", False):
            raise PlanError(
                f"etp={place.etp} on {path}", "would cut experts that end in a norm", "use etp=1"
            )
        among = place.along_etp
        wide = 3 - packed.inner  # the dim of a matrix that leads out
        gated = packed.up == "gate_up_proj"
        up_cut = ffn_cut(
            wide, up.shape[wide], among.size, gated, getattr(module, "is_concatenated", True)
        )
        cuts = {
            packed.up: up_cut,
            "down_proj": ffn_cut(packed.inner, down.shape[packed.inner], among.size),
        }
        if packed.biased:
            cuts[f"{packed.up}_bias"] = replace(up_cut, dim=1)
        edits: list[Edit] = []
        for name in per_expert(module, place):
            edits += self._cut(module, name, path, place, cuts.get(name))
            edits += self._gradients(module, name, place)
        if packed.biased and place.etp > 1:
            edits.append(SumGradient(module, "down_proj_bias", among.all))
        packed = replace(packed, adds_bias=among.index == 0)
        return [*edits, *self._swap(module, place, packed, ranks)]

    def _own_edits(self, module: nn.Module, path: str, ranks: ModelRanks) -> list[Edit]:
        lengths = {p.shape[0] for p in module._parameters.values() if p is not None and p.dim() > 1}
        experts = getattr(module, self.count, lengths.pop() if len(lengths) == 1 else None)
        if not isinstance(experts, int):
            raise PlanError(
                f"{path} ({type(module).__name__}) is to be cut as experts",
                f"does not say how many: it has no {self.count!r}, and its parameters begin with different lengths",
                "give RoutedExperts(count=...), the attribute with the number of experts",
            )
        place = self._whole_matrices(self._place(experts, path, ranks), path)
        edits: list[Edit] = []
        for name in per_expert(module, place):
            edits += self._cut(module, name, path, place)
            edits += self._gradients(module, name, place)
        if hasattr(module, self.count):
            edits.append(SetAttribute(module, self.count, place.held))
        return [*edits, *self._swap(module, place, OwnCode(), ranks)]

    def _listed_edits(
        self, module: nn.Module, path: str, ranks: ModelRanks, inner: str
    ) -> list[Edit]:
        container = module.get_submodule(inner)
        children = list(container.named_children())
        place = self._whole_matrices(self._place(len(children), path, ranks), path)
        if not place.homes.plain:
            raise PlanError(
                f"placement={ranks.plan.ep.placement}",
                f"moves experts of {path}, which are modules of their own",
                "use packed or stacked experts, or no placement",
            )
        edits: list[Edit] = []
        for number, (name, child) in enumerate(children):
            where = ".".join(part for part in (path, inner, name) if part)
            owner = number // place.held
            for under, sub in child.named_modules(prefix=where):
                for own, p in sub._parameters.items():
                    if p is not None:
                        cut = owned_by(owner, p.shape[0], place.along_ep.size)
                        edits.append(cut_parameter(sub, own, under, Placed(cut, place.along_ep)))
                        if owner == place.along_ep.index:
                            edits += self._gradients(sub, own, place)
        return [*edits, *self._swap(module, place, Listed(inner, place.first), ranks)]

    def _local(self, place: Place) -> Local | None:
        """The call of the experts that are with every token, whose numbers follow those of the others."""
        path = self.local
        if path is None:
            return None
        return lambda module, hidden, index, weights: module.get_submodule(path)(
            hidden, index - place.experts, weights
        )

    def _place(self, experts: int, path: str, ranks: ModelRanks) -> Place:
        return Place.of(ranks, placement_of(experts, path, ranks.plan.ep))

    def _whole_matrices(self, place: Place, path: str) -> Place:
        if place.etp > 1:
            raise PlanError(
                f"etp={place.etp} on {path}",
                "cuts matrices of experts, and these are not packed as transformers packs them",
                "use etp=1",
            )
        return place

    def _cut(
        self, module: nn.Module, name: str, path: str, place: Place, matrix: Cut | None = None
    ) -> list[Edit]:
        cuts: list[Placed] = []
        if place.along_ep.size > 1:
            cuts.append(Placed(place.homes.cut(), place.along_ep))
        if place.etp > 1 and matrix is not None:
            cuts.append(Placed(matrix, place.along_etp))
        return [cut_parameter(module, name, path, *cuts)] if cuts else []

    def _gradients(self, module: nn.Module, name: str, place: Place) -> list[Edit]:
        """Ranks with the same experts saw other tokens: their gradients add up, and are never averaged by edp.

        With that they hold the tokens of all dp ranks: the mean over dp is a division. Copies of an expert that a
        placement made are further such ranks.
        """
        edits: list[Edit] = [SumGradient(module, name, place.replicas, over_dp=True)]
        among = place.along_ep
        own = place.homes.ranks[among.index]
        for holders, parts in sorted(place.homes.cut().shared(among.index).items()):
            parts = tuple(sorted(parts, key=lambda part: own[part[0]]))  # the same experts' on all
            group = among.groups.of_ranks(tuple(among.members[j] for j in holders))
            edits.append(SumGradient(module, name, group, 0, parts, over_dp=True))
        return edits

    def _swap(
        self, module: nn.Module, place: Place, compute: Compute, ranks: ModelRanks
    ) -> list[Edit]:
        choice = ranks.plan.ep
        sums = place.sums and choice.exchange != "tokens" and not choice.pad and choice.nodes == 1
        capacity = Capacity(choice.capacity, choice.drop) if choice.capacity else None
        nodes = Nodes.of(place, choice.nodes) if choice.nodes > 1 else None
        if choice.pad and len(set(place.homes.sizes)) > 1:
            raise PlanError(
                "pad=true",
                f"needs equally many experts on all ranks, and {choice.placement} puts {place.homes.sizes} there",
                "use pad=false, or a placement of equal numbers",
            )
        copies = None
        if isinstance(choice, Fssdp):
            if not isinstance(compute, Packed):
                raise PlanError(
                    choice.text(),
                    f"copies packed experts, and {type(module).__name__} computes by code of its own",
                    "use ep without :fssdp",
                )
            sums, copies = False, Materialiser(place.homes, choice.spare, place.along_ep.all)
        routed = Routed(
            place,
            compute,
            sums,
            self.route,
            capacity,
            choice.pad,
            nodes,
            copies=copies,
            local=self._local(place),
        )
        return [SetAttribute(module, "_plait_experts", routed), SwapClass(module, ExpertLayer)]


def placement_of(experts: int, path: str, choice: Experts) -> Placement:
    """The placement a plan asks for: its file's for this path, or runs of experts.

    Raises:
        PlanError: the file does not fit the plan or the model, or there is none and ep does not divide the experts.
    """
    if choice.placement:
        found = read_placements(choice.placement)
        asked = f"placement={choice.placement}"
        if path not in found:
            names = listed(list(found)[:3])
            raise PlanError(
                asked, f"says nothing of {path}, only of {names}", "make it for this model"
            )
        placement = found[path]
        if (placement.experts, len(placement.ranks)) != (experts, choice.size):
            raise PlanError(
                f"{asked} on {path}",
                f"puts {placement.experts} experts on {len(placement.ranks)} ranks, "
                f"and there are {experts} on ep={choice.size}",
                f"make it for ep={choice.size}",
            )
        return placement
    if experts % choice.size:
        raise PlanError(
            f"ep={choice.size} on {path}",
            f"does not divide its {experts} experts",
            f"use a divisor of {experts}, or give placement=, a file that says who holds which",
        )
    return Placement.even(experts, choice.size)


def per_expert(module: nn.Module, place: Place) -> list[str]:
    """Names of the parameters that hold one row, or matrix, for each expert."""
    held = module._parameters.items()
    return [n for n, p in held if p is not None and p.dim() > 1 and p.shape[0] == place.experts]


def ffn_cut(dim: int, length: int, ranks: int, gated: bool = False, halves: bool = True) -> Cut:
    """Cut the FFN width over etp; a gate and its up projection stay together, whether stored in halves or in turns."""
    order = range(ranks)
    if not gated or halves:
        return Cut.chunks(dim, length, order, parts=2 if gated else 1)
    single = Cut.chunks(dim, length // 2, order)
    return Cut(dim, length, tuple(tuple((2 * a, 2 * b) for a, b in own) for own in single.runs))


def owned_by(owner: int, length: int, ranks: int) -> Cut:
    """A parameter that one rank holds whole, and the others not at all."""
    return Cut(0, length, tuple(((0, length if r == owner else 0),) for r in range(ranks)))
