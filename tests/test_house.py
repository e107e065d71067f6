"""The rules of the house that no linter knows, each with a sight of what it would catch."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
PACKAGES = ("parallel", "kvstore", "collectives", "cuda_kernels")
MAX_FILE, MAX_FUNCTION = 400, 60
LLVM = (
    "cuda_kernels/vectors.py", "cuda_kernels/gpu/numba_cuda.py", "collectives/shm/memory.py",
)  # fmt: skip
# "path" or "path:function" -> the reason why it may be longer
LONGER: dict[str, str] = {
    "cuda_kernels/paged_decode.py:body": "one kernel: its parts share registers that would all be arguments",
    "cuda_kernels/latent_decode.py:body": "as paged_decode",
}

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def too_long(source: str, name: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MAX_FILE and name not in LONGER:
        yield f"{name} has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            # a function inside (a kernel's body in its builder) is counted by itself
            lines -= sum(
                (inner.end_lineno or 0) - inner.lineno + 1
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            )
            if lines > MAX_FUNCTION and f"{name}:{node.name}" not in LONGER:
                yield f"{name}:{node.name} has {lines} lines"


def forbidden(source: str, name: str) -> Iterator[str]:
    """What may not stand in the library: our packages by bare name, ambient state, pickles, hidden inputs."""
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        for module in _imported(node):
            if module.split(".")[0] in PACKAGES:
                yield f"{where} imports {module} by its bare name; write a relative import"
            if module.split(".")[0] in ("pickle", "dill", "cloudpickle", "shelve", "marshal"):
                yield f"{where} imports {module}"
            if module.split(".")[0] == "llvmlite" and name not in LLVM:
                yield f"{where} imports llvmlite; say it in words of {LLVM[0]}"
        if name != "cuda_kernels/kernel_cache.py" and _compiles_with_numba(node):
            yield f"{where} takes Numba's njit or cfunc, whose cache is not safe; take kernel_cache's"
        if isinstance(node, ast.Global):
            yield f"{where} uses global"
        if name != "collectives/launch.py" and _reads_environment(node):
            yield f"{where} reads the environment; only collectives/launch.py does"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []


def _compiles_with_numba(node: ast.AST) -> bool:
    taken = isinstance(node, ast.ImportFrom) and node.module == "numba"
    return taken and any(alias.name in ("jit", "njit", "cfunc") for alias in node.names)


def _reads_environment(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        return False
    return node.value.id == "os" and node.attr in ("environ", "getenv", "environb")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_keep_the_rules(path: Path) -> None:
    source = path.read_text()
    assert [*too_long(source, name_of(path)), *forbidden(source, name_of(path))] == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1\n" * (MAX_FILE + 1), "lines"),
        ("def f():\n" + "    x = 1\n" * MAX_FUNCTION, ":f has 61 lines"),
        ("def f():\n    def g():\n" + "        x = 1\n" * MAX_FUNCTION, ":g has 61 lines"),
        ("import parallel.plan", "bare name"),
        ("from kvstore import KVStore", "bare name"),
        ("import pickle", "imports pickle"),
        ("def f():\n    global x\n    x = 1", "uses global"),
        ("from numba import njit, types", "kernel_cache"),
        ("from llvmlite import ir", "imports llvmlite"),
        ("import os\nos.environ['X']", "reads the environment"),
        ("import os\nos.getenv('X')", "reads the environment"),
    ],
)
def test_the_rules_catch_their_breach(source: str, complaint: str) -> None:
    found = [*too_long(source, "parallel/x.py"), *forbidden(source, "parallel/x.py")]
    assert len(found) == 1
    assert complaint in found[0]


def test_allowed_neighbours_of_the_rules() -> None:
    source = "import os\nfrom .parallel import x\nfrom ..kvstore import y\nimport parallelism\nos.path.join('a')"
    assert list(forbidden(source, "parallel/x.py")) == []
    assert list(forbidden("import os\nos.environ['X']", "collectives/launch.py")) == []


def test_exceptions_are_still_needed() -> None:
    for name in LONGER:
        assert (ROOT / name.split(":")[0]).exists(), f"{name} is gone; take it off the list"


def test_every_folder_with_python_is_a_package_that_ships() -> None:
    found = set(find_packages(str(ROOT), include=["plait*"]))
    for path in FILES:
        package = ".".join(["plait", *path.parent.relative_to(ROOT).parts])
        assert package in found, f"{package} would not be in the wheel; give it an __init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_front_door_links_to_each_package(package: str) -> None:
    link = ROOT / "plait" / package
    assert link.is_symlink(), "lost its link: clone with git's core.symlinks on"
    assert link.readlink() == Path("..") / package


def test_tests_are_not_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "two test files of one name"


def test_decisions_have_numbers_of_their_own() -> None:
    notes = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [note.name[:3] for note in notes]
    assert len(numbers) == len(set(numbers)), "two decisions of one number"
    for note in notes:
        assert note.read_text().startswith(f"# {note.name[:3]}: "), (
            f"{note.name} says another number"
        )


def test_importing_plait_is_light() -> None:
    heavy = "transformers", "mpi4py", "numba.cuda", "matplotlib", "hypothesis", "pytest", "vllm"
    look = f"import sys, plait; print([name for name in {heavy!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]", shown.stdout + shown.stderr


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("no import-linter")
    command = [tool, "--no-cache", "--config", folder / "pyproject.toml"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_an_import_upwards_is_caught(tmp_path: Path) -> None:
    for package in (".", *PACKAGES):
        (tmp_path / "plait" / package).mkdir() if package != "." else (tmp_path / "plait").mkdir()
        (tmp_path / "plait" / package / "__init__.py").write_text("")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "plait" / "parallel" / "plan.py").write_text("from ..kvstore import pool\n")
    (tmp_path / "plait" / "kvstore" / "pool.py").write_text("")
    kept = lint_imports(tmp_path)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    (tmp_path / "plait" / "kvstore" / "pool.py").write_text("from ..parallel import plan\n")
    broken = lint_imports(tmp_path)
    assert broken.returncode == 1
    assert "plait.kvstore.pool -> plait.parallel" in broken.stdout


def test_imports_go_down_here() -> None:
    kept = lint_imports(ROOT)
    assert kept.returncode == 0, kept.stdout + kept.stderr
