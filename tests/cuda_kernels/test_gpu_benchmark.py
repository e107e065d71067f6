"""benchmarks/gpu.py before it meets a device: every part runs with tensors of no memory, for names, shapes, devices."""

from __future__ import annotations

import json
import sys
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
        assert gpu.measure(PARTS, tmp_path / "rows.json", 3600) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    told = [row["kernel"] for row in rows]
    assert len(told) == len(set(told))
    assert sum("skipped" in row for row in rows) == 1, "64 x 131072 needs more than 40 GiB"
    assert all(row["us"] > 0 for row in rows if "skipped" not in row)
    for wanted in ("FlexAttention / ours", "torch / ours", "unfused of ours / ours"):
        assert any(wanted in row for row in rows)
    for codec in ("int2", "KIVI", "fp8", "MX", "NVFP4", "MXINT8", "BFP", "mx6", "ternary", "turbo"):
        assert any(codec in kernel for kernel in told)


def test_a_part_that_fails_does_not_take_the_others_along(gpu, monkeypatch, capsys) -> None:
    def fails(bandwidth):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(gpu.PARTS, "merge", (fails, ""))
    with OnMeta():
        assert gpu.measure(["merge", "launch"], None, 3600) == 1
        assert "launch: operator" in capsys.readouterr().out
        assert gpu.measure(["launch"], None, -1) == 0
    assert "minutes are over" in capsys.readouterr().out
