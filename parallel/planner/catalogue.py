"""The hardware catalogue: data sheets and measurements, each figure with its source.

Traps behind it: data sheets mix bidirectional with per-direction figures and sparse with dense peaks; sources
disagree (B200 memory 7.7 or 8.0 TB/s, network card 50 or 100 GB/s). Bytes are decimal (1 TB = 1e12).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..errors import unknown
from .hardware import Figure, Hardware

AIC = "aiconfigurator 0.12 system file"
INFX = "InferenceX gpu-specs"
BOTH = f"{AIC}; {INFX}"
STEP3 = "Step-3 (arXiv 2507.19427), hardware table"
CM = "CloudMatrix384 (arXiv 2506.12708), by digest"
SHEET = "vendor data sheet, not re-read"
GRAPH = "NCCL and custom all-reduce tables of aiconfigurator 0.12, small messages"
ASSUMED = "assumed: no measurement read"


def _links(
    up: float, domain: int, latency: float, out: float, source: str, measured: str, host: float,
    host_source: str,
) -> dict[str, Figure]:  # fmt: skip
    return {
        "scale_up": Figure(up, "B/s", source, "per direction"),
        "domain": Figure(domain, "ranks", source),
        "scale_up_latency": Figure(latency, "s", measured),
        "scale_out": Figure(out, "B/s", source, "per direction"),
        "scale_out_latency": Figure(20e-6, "s", f"{ASSUMED}; RDMA collectives of one hop"),
        "host_link": Figure(host, "B/s", host_source, "per direction"),
    }


def _chip(
    memory: float, bandwidth: float, bf16: float, fp8: float, fp4: float, source: str
) -> dict[str, Figure | None]:
    """Memory in GB, bandwidth in TB/s, peaks in dense TFLOP/s; 0 is a unit the part lacks."""
    return {
        "memory": Figure(memory * 1e9, "B", source),
        "memory_bandwidth": Figure(bandwidth * 1e12, "B/s", source, "read"),
        "bf16": Figure(bf16 * 1e12, "FLOP/s", source),
        "fp8": Figure(fp8 * 1e12, "FLOP/s", source) if fp8 else None,
        "fp4": Figure(fp4 * 1e12, "FLOP/s", source) if fp4 else None,
    }


def _around(host: float, source: str, disk: float = 3840) -> dict[str, Figure]:
    """Host memory and disk in GB, a rank's share of its server; one drive for each rank."""
    return {
        "host_memory": Figure(host * 1e9, "B", source),
        "disk": Figure(disk * 1e9, "B", f"{ASSUMED}: one NVMe drive a rank, as in DGX"),
        "disk_link": Figure(6.5e9, "B/s", f"{ASSUMED}: one PCIe 4 drive's reads", "read"),
    }


def _price(dollars: float) -> dict[str, Figure]:
    return {"price": Figure(dollars, "USD/h", STEP3)}


Rows = dict[str, tuple[str, dict[str, Any]]]


def _hopper() -> Rows:
    return {
        "a100": ("A100 SXM 80G", {
            **_chip(80, 2.039, 312, 624, 0, AIC),
            **_links(300e9, 8, 8e-6, 25e9, AIC, GRAPH, 32e9, f"{AIC}, PCIe 4"),
            "notes": ("the 8-bit peak is INT8: there is no FP8 unit",),
            **_around(250, f"{SHEET}: DGX A100, 2 TB of 8"),
        }),
        "h100": ("H100 SXM", {
            **_chip(80, 3.35, 989, 1979, 0, BOTH),
            **_links(450e9, 8, 5e-6, 50e9, BOTH, GRAPH, 64e9, f"{AIC}, PCIe 5"),
            **_around(250, f"{SHEET}: DGX H100, 2 TB of 8"),
        }),
        "h200": ("H200 SXM", {
            **_chip(141, 4.8, 989, 1979, 0, BOTH),
            **_links(450e9, 8, 5e-6, 50e9, BOTH, GRAPH, 64e9, f"{AIC}, PCIe 5"),
            "like": "h100",
            **_around(250, f"{SHEET}: DGX H200, 2 TB of 8"),
        }),
        "h800": ("H800 SXM", {
            **_chip(80, 3.35, 989, 1979, 0, STEP3),
            **_links(200e9, 8, 5e-6, 50e9, SHEET, f"{ASSUMED}, as H100", 64e9, SHEET),
            **_price(2.0), "like": "h100",
            **_around(250, f"{ASSUMED}, as H100"),
        }),
        "h20": ("H20", {
            **_chip(96, 4.0, 148, 296, 0, f"{STEP3}; memory size: {SHEET}"),
            **_links(450e9, 8, 5e-6, 50e9, SHEET, f"{ASSUMED}, as H100", 64e9, SHEET),
            **_price(0.8), "like": "h100",
            **_around(250, f"{ASSUMED}, as H100"),
        }),
        "a800": ("A800 SXM 80G", {
            **_chip(80, 2.0, 312, 0, 0, STEP3),
            **_links(200e9, 8, 8e-6, 25e9, SHEET, f"{ASSUMED}, as A100", 32e9, SHEET),
            **_price(0.75), "like": "a100",
            **_around(250, f"{ASSUMED}, as A100"),
        }),
    }  # fmt: skip


def _blackwell() -> Rows:
    return {
        "b200": ("B200 SXM", {
            **_chip(180, 8.0, 2250, 4500, 9000, f"{BOTH} (aiconfigurator: 7.7 TB/s)"),
            **_links(900e9, 8, 6e-6, 50e9, f"{BOTH} (aiconfigurator: 100 GB/s cards)", GRAPH, 64e9,
                     f"{AIC}; PCIe 6 would be 128, many hosts run PCIe 5"),
            **_around(250, f"{SHEET}: DGX B200, 2 TB of 8"),
        }),
        "b300": ("B300 SXM", {
            **_chip(268, 8.0, 2250, 4500, 13500, f"{BOTH} (aiconfigurator: 288 GB)"),
            **_links(900e9, 8, 6e-6, 100e9, BOTH, GRAPH, 128e9, f"{AIC}, PCIe 6"),
            "like": "b200",
            **_around(250, f"{ASSUMED}, as B200"),
        }),
        "gb200": ("GB200 NVL72", {
            **_chip(192, 8.0, 2500, 5000, 10000, BOTH),
            **_links(900e9, 72, 5e-6, 100e9, BOTH, GRAPH, 225e9,
                     f"{SHEET}: NVLink-C2C 450 GB/s per two-GPU superchip (aiconfigurator: 64)"),
            **_around(240, f"{SHEET}: 480 GB of LPDDR5X per two-GPU superchip"),
        }),
        "gb300": ("GB300 NVL72", {
            **_chip(288, 8.0, 2500, 5000, 15000, BOTH),
            **_links(900e9, 72, 5e-6, 100e9, BOTH, GRAPH, 225e9,
                     f"{SHEET}: NVLink-C2C 450 GB/s per two-GPU superchip (aiconfigurator: 64)"),
            "like": "gb200",
            **_around(240, f"{SHEET}: 480 GB of LPDDR5X per two-GPU superchip"),
        }),
    }  # fmt: skip


def _others() -> Rows:
    return {
        "mi300x": ("MI300X", {
            **_chip(192, 5.3, 1307, 2615, 0, INFX),
            **_links(448e9, 8, 8e-6, 50e9, INFX, f"{ASSUMED}, as A100", 64e9, SHEET),
            "like": "h100",
            **_around(250, f"{ASSUMED}, as H100"),
        }),
        "mi355x": ("MI355X", {
            **_chip(288, 8.0, 2516, 5033, 10066, INFX),
            **_links(576e9, 8, 8e-6, 50e9, INFX, f"{ASSUMED}, as A100", 64e9, SHEET),
            "like": "b200",
            **_around(250, f"{ASSUMED}, as H100"),
        }),
        "ascend910c": ("Ascend 910C, package of two dies", {
            **_chip(128, 3.2, 752, 1504, 0, CM),
            **_links(392e9, 384, 10e-6, 50e9, f"{CM}: UB, 196 GB/s per die (the white paper's total gives 350)",
                     ASSUMED, 64e9, SHEET),
            "like": "h100", "notes": ("the 8-bit peak is INT8: there is no FP8 unit",),
            **_around(250, ASSUMED),
        }),
        "cpu": ("CPU, one rank of a server", {
            "memory": Figure(64e9, "B", ASSUMED), "memory_bandwidth": Figure(20e9, "B/s", ASSUMED, "read"),
            "bf16": Figure(1e12, "FLOP/s", ASSUMED),
            **_links(5e9, 256, 50e-6, 1e9, ASSUMED, ASSUMED, 20e9, ASSUMED),
            "like": "h100", "notes": ("plait plan --calibrate measures yours",),
        }),
        "ascend910b": ("Ascend 910B", {
            **_chip(64, 1.6, 280, 0, 0, f"{STEP3}; memory size: {SHEET}"),
            **_links(196e9, 8, 10e-6, 25e9, SHEET, ASSUMED, 32e9, SHEET),
            **_price(0.67), "like": "a100",
            **_around(125, ASSUMED),
        }),
    }  # fmt: skip


@cache
def catalogue() -> dict[str, Hardware]:
    """Return every part by its short name."""
    rows = {**_hopper(), **_blackwell(), **_others()}
    return {name: Hardware(name=name, title=title, **row) for name, (title, row) in rows.items()}


def hardware(name: str) -> Hardware:
    """Return a part by name, however it is written: ``GB200 NVL72``, ``gb200``, ``H100-SXM``; or a calibrated file.

    Raises:
        PlanError: naming the nearest parts.
    """
    if name.endswith(".json"):
        from .calibration import load  # which needs torch

        return load(name)
    parts = catalogue()
    key = "".join(c for c in name.lower() if c.isalnum())
    for tail in ("", "nvl72", "sxm80g", "sxm5", "sxm"):
        short = key.removesuffix(tail) if tail else key
        if short in parts:
            return parts[short]
    raise unknown("hardware", name, parts)
