"""What a CUDA graph does, without a GPU: operations are taken down once, then repeated on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Takes down every operation on tensors; nothing of the Python around them is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero"):
            raise RuntimeError(f"{function} waits for the device, which cannot be recorded")
        results = function(*args, **(kwargs or {}))
        self._taken.append((function, args, kwargs or {}, results))
        return results

    def repeat(self) -> None:
        for function, args, kwargs, results in self._taken:
            given = {memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and memory(old) not in given:  # else a view, or made in place
                    old.copy_(new)


def memory(tensor: Tensor) -> int:
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def record(work: Callable[[], object]) -> Callable[[], object]:
    with Tape() as tape:
        work()
    return tape.repeat


def recorder(device: torch.device) -> Callable[[Callable[[], object]], Callable[[], object]]:  # noqa: ARG001
    return record
