"""The reference formulas compiled for the CPU into one pass each (range, scale, rounding and values).

Compiling takes some seconds, so a formula is compiled once it has worked through enough elements in plain torch to be worth it. Both give
the same bits, so nobody can tell when that happens. Without a C++ compiler the plain formulas stay, with one warning.
"""

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WORTH_COMPILING = 2**28  # elements: about a second of plain torch, some seconds of compiling
SMALL = 2**15  # elements: below, the call costs more than the pass

_work: dict[tuple[Any, ...], int] = {}
_compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
_failed = False


def run(formula: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """`formula(x, *args)`, compiled once it is worth it; `args` other than tensors have to be hashable.

    Args:
        formula: A function of :mod:`~lightning_qat.numerics.backends.reference`.
        x: Rows of blocks, [rows, n].
        args: Its other arguments.
    """
    if _failed or x.numel() < SMALL or len(x) == 1:
        return formula(x, *args)
    key = (formula, x.dtype, *(arg for arg in args if not isinstance(arg, Tensor)))
    function = _compiled.get(key)
    if function is None:
        _work[key] = _work.get(key, 0) + x.numel()
        if _work[key] < WORTH_COMPILING:
            return formula(x, *args)
    try:
        if function is None:
            function = _compiled[key] = _compile(formula)
        # Detached: torch compiles anew for each shape of a parameter, and for none of a tensor.
        return function(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in (x.contiguous(), *args)))
    except Exception as error:  # whatever a compiler can run into: the plain formula gives the same bits
        _give_up(error)
        return formula(x, *args)


def _compile(formula: Any) -> Callable[..., Any]:
    """A compiled function in a code object of its own: torch counts recompilations per code object, and stops at eight."""
    code = formula.__code__.replace(co_name=f"{formula.__name__}_{len(_compiled)}")
    own = types.FunctionType(code, formula.__globals__, formula.__name__, formula.__defaults__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _give_up(error: Exception) -> None:
    global _failed
    _failed = True
    warnings.warn(
        f"fake quantization could not be compiled and goes on in plain torch, which gives the same values more slowly; a C++ compiler "
        f"(g++ or clang++) has to be on the PATH: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
        stacklevel=2,
    )
