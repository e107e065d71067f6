"""benchmarks/gpu.py before it meets a device: every part runs with tensors of no memory, for names, shapes, devices."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from plait.cuda_kernels.gpu.kernel import Variant

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


class OnMeta(TorchFunctionMode):
    """What asks for CUDA gets tensors without memory; those of the host do not mix with them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "meta"
        return args[0].to("meta") if func is torch.Tensor.cuda else func(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch):
    """Give the program; its clock calls once, its launches count their arguments."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu, gpu_attention, gpu_timing = map(import_module, ("gpu", "gpu_attention", "gpu_timing"))

    def once(call, buffers=1) -> float:
        for i in range(buffers):
            call(i)
        return 10.0

    def launch(variant, grid, *args) -> None:
        assert len(args) == len(variant.arguments), variant.name

    for module in (gpu, gpu_attention, gpu_timing):
        monkeypatch.setattr(module, "microseconds", once)
    monkeypatch.setattr(gpu.toolchain, "problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "host_microseconds", lambda call: once(lambda _: call()))
    monkeypatch.setattr(gpu, "graphed", lambda call: lambda _: call())
    monkeypatch.setattr(gpu, "nvfp4_whole", lambda x: 0.5)
    monkeypatch.setattr(gpu_attention, "flex_us", lambda q, dense: 20.0)
    monkeypatch.setattr(Variant, "launch", launch)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 4096)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 << 30, 80 << 30))
    yield gpu
    for name in ("gpu", "gpu_attention", "gpu_timing"):
        sys.modules.pop(name, None)


PARTS = ["merge", "copy", "codecs", "rows", "top-k", "norm", "partials", "decode", "launch"]


def test_every_part_runs(gpu, tmp_path) -> None:
    assert list(gpu.PARTS) == PARTS
    with OnMeta():
        assert gpu.measure(PARTS, tmp_path / "rows.json", 3600, gpu.rows_of) == 0
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["device"] == "a fake"
    rows = kept["rows"]
    told = [row["kernel"] for row in rows]
    assert len(told) == len(set(told))
    assert sum("skipped" in row for row in rows) == 1, "64 x 131072 needs more than 40 GiB"
    assert all(row["us"] > 0 for row in rows if "skipped" not in row)
    for wanted in ("FlexAttention / ours", "torch / ours", "unfused of ours / ours"):
        assert any(wanted in row for row in rows)
    for codec in ("int2", "KIVI", "fp8", "MX", "NVFP4", "MXINT8", "BFP", "mx6", "ternary", "turbo"):
        assert any(codec in kernel for kernel in told)


def test_a_case_that_fails_does_not_take_the_others_along(gpu, monkeypatch, capsys) -> None:
    merge_of = gpu.merge_of

    def fails(rows, bandwidth):
        if rows == 64:
            raise RuntimeError("no such instruction")
        return merge_of(rows, bandwidth)

    monkeypatch.setattr(gpu, "merge_of", fails)
    with OnMeta():
        assert gpu.measure(["merge", "launch"], None, 3600, gpu.rows_of) == 1
        told = capsys.readouterr().out
        assert "64 rows" in told
        assert "FAILED, no such instruction" in told
        assert told.count(" MB ") == 2
        assert "launch: operator" in told
        assert gpu.measure(["launch"], None, -1, gpu.rows_of) == 0
    assert "minutes are over" in capsys.readouterr().out


def test_after_a_lost_context_a_part_ends(gpu, monkeypatch) -> None:
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with OnMeta():
        *_, first, last = gpu.rows_of("merge")
    assert "illegal memory access" in first["skipped"]
    assert "lost the CUDA context" in last["skipped"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of a process that has threads
def test_parts_have_processes_of_their_own(gpu, monkeypatch, capsys, tmp_path) -> None:
    def dies(bandwidth):
        yield {"kernel": "before", "us": 1.0, "goal": ""}
        os._exit(9)

    def hangs(bandwidth):
        yield {"kernel": "also", "us": 1.0, "goal": ""}
        time.sleep(600)

    monkeypatch.setattr(gpu, "PART_SECONDS", 12)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 3e12)
    for name, part in (("merge", dies), ("copy", hangs)):
        monkeypatch.setitem(gpu.PARTS, name, (part, ""))
    assert gpu.measure(["merge", "copy"], tmp_path / "rows.json", 3600) == 2
    kernels = [row["kernel"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert kernels == ["before", "merge, the rest", "also", "copy, the rest"]
    told = capsys.readouterr().out
    assert "ended with 9" in told
    assert "no end after 12 s" in told


def test_without_a_device_it_says_so(gpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.measure(["merge"], None, 3600, gpu.rows_of) == 0
    assert "not measured: no CUDA device" in capsys.readouterr().out
