"""Compile kernels with numba-cuda: the only file that knows its inside, and LLVM on CUDA (on the CPU: vectors.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import CellType, FunctionType, ModuleType
from typing import Any

from . import ptx
from .ptx.words import WORDS, Instruction

LETTERS = {"u32": "r", "i32": "r", "u64": "l", "f32": "f"}


def compile_to_ptx(
    body: Callable[..., None], arguments: tuple[str, ...], arch: tuple[int, int], threads: int
) -> str:
    """Compile a kernel to PTX for a compute capability; needs libnvvm, no GPU and no driver."""
    types = _numba("types")
    teach()
    signature = types.void(*(getattr(types, NUMBA[name]) for name in arguments))
    # fastmath would let the compiler assume that there is no NaN: not here
    text, _ = _numba().compile_ptx(_linked(body, {}), signature, cc=arch, launch_bounds=threads)
    return text


NUMBA = {"u32": "uint32", "i32": "int32", "u64": "uint64", "f32": "float32"}


def _numba(name: str = "") -> Any:
    return import_module(f"numba.cuda.{name}".rstrip("."))


@lru_cache(maxsize=1)
def _taught() -> set[Callable[..., Any]]:
    """What numba-cuda has been taught so far."""
    return set()


def teach() -> None:
    """Register the words that are new since the last call."""
    known = _taught()
    if not known:
        _teach_arrays()
    for function, instruction in WORDS.items():
        if function not in known:
            _teach_word(function, instruction)
            known.add(function)


def _teach_word(function: Callable[..., Any], instruction: Instruction) -> None:
    types, templates = _numba("types"), _numba("typing.templates")

    def kinds(names: tuple[str, ...]) -> list[Any]:
        return [getattr(types, NUMBA[name]) for name in names]

    results = kinds(instruction.results)
    if not results:
        returned: Any = types.none
    elif len(results) == 1:
        returned = results[0]
    else:
        returned = types.UniTuple(results[0], len(results))
    form = templates.signature(returned, *kinds(instruction.arguments))
    template = type(
        function.__name__, (templates.ConcreteTemplate,), {"key": function, "cases": [form]}
    )
    _numba("cudadecl").registry.register_global(function)(template)
    _numba("cudaimpl").registry.lower(function, *form.args)(_lowering(instruction, returned))


def _lowering(instruction: Instruction, returned: Any) -> Callable[..., Any]:
    from llvmlite import ir

    kinds: dict[str, Any] = {
        "u32": ir.IntType(32),
        "i32": ir.IntType(32),
        "u64": ir.IntType(64),
        "f32": ir.FloatType(),
    }
    outputs = [kinds[name] for name in instruction.results]
    if not outputs:
        result: Any = ir.VoidType()
    else:
        result = outputs[0] if len(outputs) == 1 else ir.LiteralStructType(outputs)
    constraints = ["=" + LETTERS[name] for name in instruction.results]
    constraints += [LETTERS[name] for name in instruction.arguments]
    if not instruction.pure and not (
        instruction.warp and outputs
    ):  # barriers order memory, shuffles do not
        constraints.append("~{memory}")
    inputs = [kinds[name] for name in instruction.arguments]
    attributes = ("convergent",) if instruction.warp else ()

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        asm = ir.InlineAsm(
            ir.FunctionType(result, inputs),
            instruction.text,
            ",".join(constraints),
            side_effect=not instruction.pure,
        )
        value = builder.call(asm, args, attrs=attributes)
        if not outputs:
            return context.get_dummy_value()
        if len(outputs) == 1:
            return value
        parts = [builder.extract_value(value, i) for i in range(len(outputs))]
        return context.make_tuple(builder, returned, parts)

    return lower


def _linked(function: Callable[..., Any], known: dict[Any, Any]) -> Callable[..., Any]:
    """Copy a function so that the device functions it calls are numba's, inlined before types are known.

    An `overload` would compile each by itself first, and for that numba-cuda wants a device present.
    """
    names, cuda = function.__code__.co_names, _numba()

    def swap(value: Any) -> Any:
        if value is ptx:
            twin = ModuleType("ptx")
            for name in names:
                if hasattr(ptx, name):
                    setattr(twin, name, swap(getattr(ptx, name)))
            return twin
        if isinstance(value, FunctionType) and hasattr(value, "inlined"):
            if value not in known:
                known[value] = cuda.jit(device=True, inline="always")(_linked(value, known))
            return known[value]
        return value

    scope = dict(function.__globals__)
    scope.update({name: swap(scope[name]) for name in names if name in scope})
    cells = tuple(CellType(swap(cell.cell_contents)) for cell in function.__closure__ or ())
    return FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)


def _teach_arrays() -> None:
    cudadecl, cudaimpl, types = _numba("cudadecl"), _numba("cudaimpl"), _numba("types")

    def record(key: Callable[..., Any], like: type) -> None:
        template = type(key.__name__, (like,), {"key": key})
        cudadecl.registry.register_global(key)(template)

    for key, lower in (
        (ptx.shared, cudaimpl.cuda_shared_array_integer),
        (ptx.local, cudaimpl.cuda_local_array_integer),
    ):
        record(key, cudadecl.Cuda_array_decl)
        cudaimpl.registry.lower(key, types.IntegerLiteral, types.Any)(lower)
        cudaimpl.registry.lower(key, types.IntegerLiteral, types.Any, types.IntegerLiteral)(lower)
    record(ptx.atomic_add, cudadecl.Cuda_atomic_add)
    lower = cudaimpl.registry.lower(ptx.atomic_add, types.Array, types.intp, types.Any)
    lower(cudaimpl.ptx_atomic_add_tuple)
