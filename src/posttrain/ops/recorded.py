"""Functions of tensors as graphs of torch's own, which run their operations without Python between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_graphs: dict[Any, Callable[..., Any]] = {}


def recorded(function: Callable[..., Any], *tensors: Tensor, **fixed: Any) -> Any:
    """``function(*tensors, **fixed)``: on a processor by the graph of its first call with such arguments, else as it is.

    What the function does may depend on ``fixed`` (hashable), on dtypes and on how many tensors there are, but not on their
    sizes, which it reads from ``x.shape`` alone: those vary from call to call, and so do the values. It may write into its
    arguments, by methods (``copy_``, ``index_put_``): an assignment to items is recorded with the sizes it saw. Without gradients.
    """
    if tensors[0].device.type != "cpu":
        return function(*tensors, **fixed)
    key = (function, tensors[0].dtype, len(tensors), *fixed.values())
    graph = _graphs.get(key)
    if graph is None:

        def function_of_tensors(*args: Tensor) -> Any:
            return function(*args, **fixed)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it recommends instead needs a compiler for C++
            graph = cast("Any", torch.jit).trace(function_of_tensors, tensors, check_trace=False)
        _graphs[key] = graph
    return graph(*tensors)
