"""Install a wheel in a fresh environment and use it from another directory: does it hold what it should?

torch and the other requirements come from the environment that runs this (a .pth file), the wheel itself does not.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("parallel", "kvstore", "collectives", "cuda_kernels")
SMOKE = """
import sys, pathlib, torch, plait
where = pathlib.Path(plait.__file__).resolve()
assert where.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"imported from {where}, not from the wheel"
assert (where.parent / "py.typed").exists()
import plait.parallel, plait.kvstore, plait.collectives, plait.cuda_kernels
from plait import Plan, parallelize
world = plait.init()
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.down = torch.nn.Linear(16, 8)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))
torch.manual_seed(0)
model, x = Block(), torch.randn(2, 8)
expected = model(x)
model = parallelize(model, Plan(), rules={"up": "colwise", "down": "rowwise"})
torch.testing.assert_close(model(x), expected)
world.print("the wheel works:", where.parent)
world.close()
"""


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Path(folder)
        venv.create(elsewhere / "venv", with_pip=True)
        python = elsewhere / "venv" / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel],
            check=True,
        )
        borrow_requirements(python)
        subprocess.run([python, "-c", SMOKE], cwd=elsewhere, check=True)
        subprocess.run([python.parent / "plait", "--version"], cwd=elsewhere, check=True)
        subprocess.run([python, "-m", "plait", "doctor"], cwd=elsewhere, check=True)


def check_contents(wheel: Path) -> None:
    """Every Python file of the four packages is in the wheel, as a file and not as a link, and nothing else is."""
    expected = {f"plait/{path.name}" for path in (ROOT / "plait").glob("*.py")} | {"plait/py.typed"}
    for package in PACKAGES:
        expected |= {f"plait/{path.relative_to(ROOT)}" for path in (ROOT / package).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        links = [info.filename for info in archive.infolist() if info.external_attr >> 28 == 0o12]
    if links or held != expected:
        sys.exit(
            f"{wheel.name}: missing {sorted(expected - held)}, too much {sorted(held - expected)}, links {links}"
        )


def borrow_requirements(python: Path) -> None:
    """Let the new environment see our packages after its own; our editable plait stays out (its .pth is not run)."""
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run(
        [python, "-c", show], capture_output=True, text=True, check=True
    ).stdout.strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")


if __name__ == "__main__":
    main()
