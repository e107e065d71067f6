"""Make mx_oracle.safetensors: what torchao 0.18 and ml_dtypes 0.5.4 make of some numbers in MX and NVFP4.

`make oracles` makes an environment with them, runs this there and compares with the file that stands beside it.

    .venv-oracles/bin/python tests/kvstore/mx_oracle.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

ROWS, WIDTH = 48, 128
FORMS = {"e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4}


def numbers() -> torch.Tensor:
    """Ties, zeros, an infinity, a NaN, sizes over many powers of two; exact in bfloat16."""
    draws = torch.Generator().manual_seed(0)
    sizes = torch.exp2(torch.randint(-40, 40, (ROWS, 1), generator=draws).float())
    x = torch.randn(ROWS, WIDTH, generator=draws) * sizes
    x[0] = torch.randint(-128, 128, (WIDTH,), generator=draws) / 16
    x[1] = torch.randint(-16, 16, (WIDTH,), generator=draws) / 4
    x[2] = 0
    x[3, 40], x[4, 70] = float("inf"), float("nan")
    return x.bfloat16()


def main() -> None:
    """Quantise with every form and rule."""
    import ml_dtypes  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file
    from torchao.prototype.mx_formats.mx_tensor import (  # pyright: ignore[reportMissingImports]
        ScaleCalculationMode,
        to_mx,
    )
    from torchao.prototype.mx_formats.nvfp4_tensor import (  # pyright: ignore[reportMissingImports]
        nvfp4_quantize,
        per_tensor_amax_to_scale,
    )

    x = numbers()
    kinds = {
        "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e3m2": "fp6_e3m2", "e2m3": "fp6_e2m3",
        "e2m1": torch.float4_e2m1fn_x2,
    }  # fmt: skip
    names = {
        "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e3m2": "float6_e3m2fn", "e2m3": "float6_e2m3fn",
        "e2m1": "float4_e2m1fn",
    }  # fmt: skip
    out = {"x": x}
    for form, kind in kinds.items():
        codes = np.arange(1 << FORMS[form], dtype=np.uint8).view(getattr(ml_dtypes, names[form]))
        out[f"{form}.table"] = torch.from_numpy(codes.astype(np.float32))
        for rule in ("floor", "even", "ceil"):
            scales, data = to_mx(x, kind, 32, ScaleCalculationMode(rule))
            out[f"{form}.{rule}.scales"] = scales.view(torch.uint8)
            out[f"{form}.{rule}.codes"] = data.view(torch.uint8).contiguous()
    finite = x.nan_to_num(1.0, 1.0, 1.0)
    whole = per_tensor_amax_to_scale(finite.abs().amax())
    scales, data = nvfp4_quantize(finite, 16, whole)
    out |= {
        "nvfp4.whole": whole.reshape(1),
        "nvfp4.scales": scales.view(torch.uint8),
        "nvfp4.codes": data,
    }
    where = Path(__file__).with_suffix(".safetensors")
    save_file(
        {name: part.clone() for name, part in out.items()},
        sys.argv[1] if len(sys.argv) > 1 else where,
    )


if __name__ == "__main__":
    main()
