"""Communicators of a folding: real worlds over gloo and shared memory, a world of one, and fake worlds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from plait.collectives.world import CHOSEN
from plait.parallel.errors import PlanError
from plait.parallel.folding import Folding
from plait.parallel.groups import Groups
from plait.parallel.plan import Plan
from world import run_world

# torch 2.13 renamed the single-tensor collectives and warns; torch 2.11 has only the old names
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")

AXES = ("tp", "kvp", "cp", "ffn_tp", "dp", "pp", "etp", "ep", "edp", "world")


def fold(text: str) -> Folding:
    return Folding.of(Plan.parse(text))


# --- real worlds -----------------------------------------------------------------------------


def choose_gloo() -> None:
    """Say what ``plait.init("gloo")`` says: groups are gloo's, not of the best kind there is."""
    dist.group.WORLD._set_group_desc(CHOSEN)


def sums_over_every_axis(text: str, backend: str) -> tuple[int, dict[str, str]]:
    """Each rank adds its own bit: the sum over a group names exactly the ranks in it."""
    if backend == "gloo":
        choose_gloo()
    folding, names = fold(text), {}
    with Groups.create(folding) as groups:
        assert groups.count == 0
        for axis in AXES:
            group = groups.group(axis)
            bits = torch.tensor(2**groups.rank)
            if group is None:
                assert groups.ranks(axis) == (groups.rank,)
            else:
                assert dist.get_backend(group).removeprefix("plait_") == backend
                dist.all_reduce(bits, group=group)
                assert dist.get_process_group_ranks(group) == list(groups.ranks(axis))
                assert groups.group(axis) is group
            assert bits.item() == sum(2**r for r in folding.group(groups.rank, axis)), axis
            names[axis] = groups.axis_of(group)
        assert (groups.group("world") is dist.group.WORLD) == (backend == "gloo")
        most = (
            folding.size if backend == "gloo" else folding.size + 1
        )  # gloo's world is there already
        distinct = {groups.ranks(a) for a in AXES if 1 < len(groups.ranks(a)) < most}
        assert groups.count == len(distinct)
        return groups.count, names


@pytest.mark.parametrize(
    ("text", "ranks", "count"),
    [("kvp2 tp2 ep2 etp2", 4, 2), ("tp2 dp2 ep4", 4, 2), ("kvp3 tp2", 6, 2), ("tp3", 3, 0)],
)
@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_groups_join_the_right_ranks(text: str, ranks: int, count: int, backend: str) -> None:
    counts, names = zip(*run_world(sums_over_every_axis, ranks, text, backend), strict=True)
    assert set(counts) == {count if backend == "gloo" else count + 1}
    assert names[0]["tp"] == "tp"
    assert names[0]["dp"] in ("dp", "self")
    if text.startswith("kvp2"):
        assert names[0]["ep"] == names[0]["kvp"] == names[0]["cp"] == "kvp"
        assert names[0]["etp"] == "tp"
        assert names[0]["world"] == names[0]["ffn_tp"] == "ffn_tp"


def meshes_over_groups(text: str) -> int:
    groups = Groups.create(fold(text))
    groups.prepare("kvp", "tp", ("tp", "kvp"))
    made = groups.count
    whole = torch.arange(60.0).reshape(12, 5)
    for axes, cuts in (
        (("kvp", "tp"), [Shard(0), Shard(0)]),
        (("tp", "kvp"), [Shard(0), Shard(1)]),
        (("ffn_tp",), [Shard(0)]),
        (("tp",), [Shard(1)]),
        (("kvp", "tp"), [Replicate(), Shard(0)]),
    ):
        mesh = groups.device_mesh(*axes, device_type="cpu")
        assert mesh.mesh_dim_names == axes
        assert all(mesh.get_group(axis) is groups.group(axis) for axis in axes)
        here = groups.folding.coords(groups.rank)
        if "ffn_tp" not in axes:
            assert mesh.get_coordinate() == tuple(here[axis] for axis in axes)
        cut = distribute_tensor(whole, mesh, cuts, src_data_rank=None)
        assert torch.equal(cut.full_tensor(), whole)
    assert groups.count == made
    alone = groups.device_mesh("dp", "tp")
    assert alone.shape == (1, 2)
    assert groups.count == made + 1
    groups.close()
    return made


def test_device_meshes_make_no_communicators() -> None:
    assert run_world(meshes_over_groups, 4, "kvp2 tp2") == [3] * 4


def closed_and_made_again() -> None:
    before = len(dist.distributed_c10d._world.pg_map)
    for _ in range(3):
        groups = Groups.create(fold("kvp2 tp2"))
        one = torch.ones(1)
        dist.all_reduce(one, group=groups.group("kvp"))
        assert one.item() == 2
        assert groups.count == 1
        groups.close()
        groups.close()
        assert len(dist.distributed_c10d._world.pg_map) == before
        with pytest.raises(RuntimeError, match="closed"):
            groups.group("tp")
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one.item() == 4


def test_close_ends_what_was_made_and_only_that() -> None:
    run_world(closed_and_made_again, 4)


def closed_after_the_world() -> None:
    groups = Groups.create(fold("kvp2 tp2"))
    groups.prepare("tp", "kvp")
    dist.destroy_process_group()
    groups.close()


def test_close_after_the_world_has_ended() -> None:
    run_world(closed_after_the_world, 4)


def with_uneven_counts() -> None:
    """Ranks that hold different numbers of groups still meet in the next one."""
    groups = Groups.create(fold("kvp2 tp2"))
    if groups.rank in (0, 1):
        groups.group("tp")
    if groups.rank == 0:
        groups.device_mesh("dp")
    bits = torch.tensor(2**groups.rank)
    dist.all_reduce(bits, group=groups.group("kvp"))
    assert bits.item() == (0b0101 if groups.rank % 2 == 0 else 0b1010)
    groups.close()


def test_ranks_with_uneven_counts_meet() -> None:
    run_world(with_uneven_counts, 4)


def of_another_size() -> str:
    with pytest.raises(PlanError) as caught:
        Groups.create(fold("kvp2 tp2"))
    return str(caught.value)


def test_a_world_of_another_size_is_refused_alike_everywhere() -> None:
    told = set(run_world(of_another_size, 2))
    assert len(told) == 1
    assert "launch 4 ranks" in told.pop()


def fake_beside_real() -> list[float]:
    with Groups.fake(fold("kvp4 tp8 dp2"), 13) as groups:
        dist.all_reduce(torch.ones(3, device="meta"), group=groups.group("kvp"))
        assert groups.device_mesh("tp").get_coordinate() == (13 % 8,)
    one = torch.ones(1)
    dist.all_reduce(one)
    return [one.item(), dist.get_rank(), dist.get_world_size()]


def test_a_fake_world_does_not_disturb_a_real_one() -> None:
    assert run_world(fake_beside_real, 2) == [[2.0, 0, 2], [2.0, 1, 2]]


def odd_groups() -> None:
    groups = Groups.create(fold("tp4"))
    if groups.rank != 2:
        group = groups.of_ranks((3, 0, 1))
        assert group is not None
        assert group.size() == 3
        bits = torch.tensor(2**groups.rank)
        dist.all_reduce(bits, group=group)
        assert bits.item() == 0b1011
        assert groups.axis_of(group) == "ranks 0,1,3"
    else:
        with pytest.raises(PlanError, match="leaves out rank 2"):
            groups.of_ranks((3, 0, 1))
    assert groups.of_ranks((groups.rank,)) is None
    groups.close()


def test_groups_of_given_ranks() -> None:
    run_world(odd_groups, 4)


# --- no world --------------------------------------------------------------------------------


def test_create_without_a_world() -> None:
    assert not dist.is_initialized()
    with pytest.raises(PlanError, match=r"not initialised.*plait.init.*nproc-per-node 2"):
        Groups.create(fold("tp2"))
    assert Groups.create(fold("tp1")).group("world") is None


def test_a_world_of_one() -> None:
    with Groups.single() as groups:
        assert all(groups.group(axis) is None for axis in AXES)
        assert groups.axis_of(None) == "self"
        assert groups.count == 0
        mesh = groups.device_mesh("tp")
        whole = torch.arange(6.0).reshape(3, 2)
        cut = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        assert torch.equal(cut.full_tensor(), whole)
        gathered = funcol.all_gather_tensor(whole, 0, mesh)
        assert torch.equal(funcol.wait_tensor(gathered), whole)  # gloo of one, not the fake
    assert not dist.is_initialized()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_fake_groups_run_every_collective(device: str) -> None:
    with Groups.fake(fold("kvp4 tp2 dp2 ep8 pp3"), 29) as groups:
        assert groups.count == 0
        group = groups.group("kvp")
        assert group is not None
        assert (group.rank(), group.size()) == (2, 4)
        assert dist.get_process_group_ranks(group) == [25, 27, 29, 31]
        assert groups.axis_of(group) == "kvp"
        assert groups.count == 1
        x, out = torch.ones(8, 3, device=device), torch.ones(32, 3, device=device)
        group.allreduce([x]).wait()
        dist.all_reduce(x, group=group)
        dist.broadcast(x, group=group, group_src=1)
        dist.all_gather_into_tensor(out, x, group=group)
        dist.reduce_scatter_tensor(x, out, group=group)
        dist.all_to_all_single(torch.ones(8, 3, device=device), x, group=group)
        dist.all_to_all_single(out[:6], x[:4], [3, 1, 0, 2], [1, 1, 1, 1], group=group)
        dist.barrier(group=group)
        assert funcol.wait_tensor(funcol.all_gather_tensor(x, 0, group)).shape == (32, 3)
        ring = [
            dist.P2POp(dist.isend, x, group=group, group_peer=3),
            dist.P2POp(dist.irecv, x, group=group, group_peer=1),
        ]
        for work in dist.batch_isend_irecv(ring):
            work.wait()
    assert not dist.is_initialized()


def test_fake_worlds_of_any_size_and_dtensor() -> None:
    folding = fold("kvp64 tp8 dp16")
    with Groups.fake(folding, 8191) as groups:
        mesh = groups.device_mesh("kvp", "tp")
        assert mesh.get_coordinate() == (63, 7)
        local = torch.empty(2, 3, device="meta")
        cut = DTensor.from_local(local, mesh, [Shard(0), Shard(1)], run_check=False)
        assert cut.shape == (128, 24)
        assert cut.full_tensor().shape == (128, 24)
        assert groups.count == 2
    with pytest.raises(PlanError, match="outside the 8192 ranks"):
        Groups.fake(folding, 8192)


def test_fake_close_forgets_everything() -> None:
    table = dist.distributed_c10d._world.pg_group_ranks
    before = len(table)
    groups = Groups.fake(fold("kvp2 tp2"), 0)
    group = groups.group("kvp")
    assert group is not None
    assert len(table) == before + 1
    name = group.group_name
    groups.close()
    assert len(table) == before
    with pytest.raises(RuntimeError):
        dist.distributed_c10d._resolve_process_group(name)


def test_every_rank_names_its_groups_alike() -> None:
    folding = fold("kvp2 tp2 dp2 ep4 etp2")
    for axes in (*((axis,) for axis in AXES), ("dp", "kvp"), ("tp", "ep")[:1]):
        names: dict[tuple[int, ...], set[str]] = {}
        for rank in range(folding.size):
            with Groups.fake(folding, rank) as groups:
                names.setdefault(groups.ranks(*axes), set()).add(
                    groups.axis_of(groups.group(*axes))
                )
        assert all(len(said) == 1 for said in names.values())


def test_mesh_refusals() -> None:
    with Groups.fake(fold("kvp2 tp2"), 0) as groups:
        for axes in ((), ("tp", "tp"), ("tp", "ffn_tp")):
            with pytest.raises(PlanError):
                groups.device_mesh(*axes)
