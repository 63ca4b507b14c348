"""Sums over rows of something large, with gradients, a chunk of rows at a time: logits [rows, vocabulary] never exist at once.

The gradient of a sum over rows is the sum of the rows' gradients. So it is computed along with the value, chunk by chunk, and what a chunk
needed is gone before the next one begins. The backward pass only multiplies; the head's product is computed once.

Memory: for hidden states [rows, d], a head of V d parameters and b bytes per logit (2 under bf16 autocast), with the losses of this package
the most that exists at once beside the inputs is about

    3 b chunk V                  logits of student and teacher, and the gradient of the student's; b chunk V for each further loss
    + (4 + 4 + 2 b) V d          the head's gradient: its sum in fp32, that of one chunk, and what autocast casts
    + 3 * 4 rows d               the gradient of the hidden states, kept, multiplied and accumulated, if they are fp32
    + 12 * 4 ROW_ELEMENTS        fp32 copies of a few rows of logits, at most 12 (see base.py): 25 MB on a CPU, 0.8 GB on a GPU

so the number of rows enters by their hidden states alone. The plain form keeps more than (2 b + 8) rows V.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_qat.losses.logits import wide_dtype

RowFunction = Callable[[slice, Tensor], Tensor]


def chunked_sums(function: RowFunction, hidden: Tensor, parameters: Sequence[Tensor], chunk: int) -> Tensor:
    """Sum what `function` gives for each chunk of rows, keeping gradients and nothing else.

    The gradient is that of the first sum; the others are for logging. It is not divided by the number of rows before the end, so each
    row's gradient is of order 1, and none underflows in fp16. Divide the result by the number of rows for a mean.

    Rows must not know of each other in `function`: one that takes a range over all of them, as the input quantizer of a head with one scale
    per tensor does, takes it over a chunk here.

    Args:
        function: Called with a slice of the rows and their part of `hidden`, [c, d]; returns [m] sums over them. The first is
            differentiable. A gradient reaches `hidden` and `parameters`, and whatever else needs one is refused.
        hidden: Of the rows that count, [rows, d].
        parameters: What `function` uses besides and what may need a gradient: weight, bias and scales of a head. They may be used
            elsewhere in the same model. Their gradients are added up in fp32 or better.
        chunk: Rows at a time.

    Returns:
        Sums over all rows, [m]; differentiable once, a second derivative is refused.

    Raises:
        ValueError: No rows; `chunk` below 1; a tensor that needs a gradient is not listed; a listed one has a gradient hook, which would
            see the gradient of each chunk and then their sum.
    """
    if hidden.shape[0] == 0:
        raise ValueError(f"hidden: no rows, shape {tuple(hidden.shape)}; at least one token must count")
    if chunk < 1:
        raise ValueError(f"chunk: {chunk}; rows at a time, 1 or more")
    if torch.compiler.is_compiling():  # a backward pass inside a forward pass cannot be traced
        disabled: Callable[..., Tensor] = torch.compiler.disable(chunked_sums)  # no decorator: that would import the compiler, for seconds
        return disabled(function, hidden, parameters, chunk)
    # Inside a Function torch says what could need a gradient, not whether anybody wants it.
    if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in parameters)):
        _refuse_hooks(parameters)
        sums: Tensor = _ChunkedSums.apply(function, chunk, hidden, *parameters)
        return sums
    with torch.no_grad(), _no_cast_cache():
        parts = (function(rows, hidden[rows]) for rows in _slices(hidden.shape[0], chunk))
        total = next(parts)
        for part in parts:
            total = total + part
        return total


class _ChunkedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: RowFunction, chunk: int, hidden: Tensor, *parameters: Tensor) -> Tensor:
        listed = [p for p in parameters if p.requires_grad]
        hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        gradients: list[Tensor | None] = [None] * len(listed)
        total: Tensor | None = None
        for rows in _slices(hidden.shape[0], chunk):
            part = hidden[rows].detach().requires_grad_(hidden.requires_grad)
            sums, found = _sums_and_gradients(function, rows, part, listed, check=total is None)
            total = sums if total is None else total + sums
            if hidden_gradient is not None:
                own = found.pop(0)
                hidden_gradient[rows] = 0 if own is None else own
            for i in range(len(listed)):
                gradients[i] = _added(gradients[i], found.pop(0))  # no name keeps a chunk's gradient alive through the next one
        results = iter(None if g is None else g.to(p.dtype) for g, p in zip(gradients, listed, strict=True))
        ctx.save_for_backward(hidden_gradient, *(next(results) if p.requires_grad else None for p in parameters))
        assert total is not None  # there is a row
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what comes back would be taken for constants
            raise RuntimeError("create_graph=True: chunked sums have no second derivative; use the loss that is not chunked")
        return None, None, *(None if gradient is None else gradient * upstream[0] for gradient in ctx.saved_tensors)


def _sums_and_gradients(
    function: RowFunction, rows: slice, part: Tensor, listed: list[Tensor], check: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The sums of one chunk, and the gradients of the first for the chunk's rows, if they want it, and for the tensors of `listed`."""
    wanted = [part, *listed] if part.requires_grad else listed
    with torch.enable_grad(), _no_cast_cache():
        sums = function(rows, part)
        if check:
            _refuse_unlisted(sums, wanted)
        return sums.detach(), list(torch.autograd.grad(sums[0], wanted, allow_unused=True))


def _slices(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk))


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return total
    if total is None:
        return gradient.to(wide_dtype(gradient), copy=True)  # autograd may give a view of something else
    return total.add_(gradient)


@contextmanager
def _no_cast_cache() -> Iterator[None]:
    """Without autocast's cache of cast weights: a copy from a region without gradients would cut the weight off, without a word."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _refuse_hooks(parameters: Sequence[Tensor]) -> None:
    for index, parameter in enumerate(parameters):
        if parameter._backward_hooks:
            raise ValueError(
                f"parameters: number {index}, {tuple(parameter.shape)}, has a hook from register_hook, which would be called for every "
                "chunk; use register_post_accumulate_grad_hook, or the loss that is not chunked"
            )


def _refuse_unlisted(sums: Tensor, wanted: Sequence[Tensor]) -> None:
    """What is forgotten in `parameters` would get no gradient, without a word."""
    if not sums.requires_grad:
        raise ValueError("function: its first sum needs no gradient; it must depend on hidden or on parameters")
    ends = {tensor.grad_fn for tensor in wanted if tensor.grad_fn is not None}
    names = {id(tensor) for tensor in wanted}
    nodes, seen = [sums.grad_fn], set(ends)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of the nodes that add to a leaf's gradient
        if isinstance(leaf, Tensor) and id(leaf) not in names:
            raise ValueError(f"parameters: a tensor {tuple(leaf.shape)} that function uses needs a gradient but is not listed; list it")
        nodes += [following for following, _ in node.next_functions]
