"""Linear layers as the engine multiplies them: those that read the same input as one product, laid out beforehand.

oneDNN multiplies few rows several times faster when the weights lie as its kernels read them, and one wide product is
faster than three narrow ones. Both are done once, at start.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serving.model import ModelError


class Product:
    """y = x·Wᵀ + bias for the weights of several layers at once, their outputs side by side."""

    def __init__(self, modules: Sequence[nn.Linear | Conv1D]) -> None:
        weights = [out_in(module) for module in modules]
        weight_OI = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._bias: Tensor | None = None
        if any(module.bias is not None for module in modules):
            biases = (module.bias for module in modules)
            self._bias = torch.cat(
                [
                    weight.new_zeros(len(weight)) if bias is None else bias
                    for weight, bias in zip(weights, biases, strict=True)
                ]
            )
        self._packed = weight_OI.device.type == "cpu" and _can_lay_out(weight_OI.dtype)
        if self._packed:
            weight_OI = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
        else:
            _share(modules, weight_OI)
        self._weight = weight_OI
        self.copied_bytes = sum(weight.nbytes for weight in weights) if self._packed else 0
        """Memory that the weights take once more."""

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return linear(x, self._weight, self._bias)


def _can_lay_out(dtype: torch.dtype) -> bool:
    """True when oneDNN has kernels for this type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def computes_bfloat16() -> bool:
    """True when this processor has instructions for bfloat16; oneDNN makes do without, several times slower."""
    cpu = torch.cpu
    return _can_lay_out(torch.bfloat16) and bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def _share(modules: Sequence[nn.Linear | Conv1D], weight_OI: Tensor) -> None:
    """Let the modules' weights be parts of the one tensor, so that there is no second copy of them."""
    start = 0
    for module in modules:
        size = len(out_in(module))
        part_OI = weight_OI[start : start + size]
        module.weight.data = part_OI if isinstance(module, nn.Linear) else part_OI.T
        start += size


def siblings(model: PreTrainedModel, targets: Collection[str]) -> list[list[str]]:
    """The target modules, those together that belong to one module and read the very same tensor.

    Found by a forward of two tokens; modules that it does not reach stand alone. Raises ModelError when it fails.
    """
    read: list[tuple[str, Tensor]] = []
    modules = dict(model.named_modules())
    hooks = [
        modules[path].register_forward_pre_hook(lambda _, given, path=path: read.append((path, given[0])))
        for path in targets
    ]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device), use_cache=False)
    except Exception as error:  # foreign code, of which only one thing matters: it does not run
        name = model.config.model_type
        raise ModelError(f"a {name} model cannot be served: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    last: Tensor | None = None
    met: set[str] = set()
    for path, x in read:
        if path in met:
            continue
        met.add(path)
        if x is last and path.rpartition(".")[0] == groups[-1][-1].rpartition(".")[0]:
            groups[-1].append(path)
        else:
            groups.append([path])
        last = x
    return [*groups, *([path] for path in targets if path not in met)]


def out_in(module: nn.Linear | Conv1D) -> Tensor:
    """The weight as [out, in]."""
    return module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().T
