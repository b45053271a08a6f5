"""What this machine can do at most: reading memory, multiplying matrices, and the tokens a second that follow."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.shapes import Shape


def measure() -> dict[str, float]:
    """bytes/s of a sum over 1 GiB, and FLOP/s of products of 2048 × 2048 matrices: the best of five.

    In fp32, and in bf16 where the processor computes in it (elsewhere PyTorch does so hundreds of times slower).
    """
    found = {"bandwidth": bandwidth(torch.device("cpu"))}
    bf16 = [("bf16", torch.bfloat16)] if has_bf16() else []
    for name, dtype in [("fp32", torch.float32), *bf16]:
        a, b = torch.randn(2, 2048, 2048).to(dtype)
        found[f"flops_{name}"] = 2 * 2048**3 / _best(lambda a=a, b=b: a @ b)
    return found


def bandwidth(device: torch.device) -> float:
    """bytes/s of a sum over 1 GiB: the best of five."""
    memory = torch.zeros(2**28, device=device)
    return memory.nbytes / _best(lambda: memory.sum().item())


def has_bf16() -> bool:
    """True when this processor multiplies in bf16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def tokens_a_second(machine: dict[str, float], shape: Shape, at_once: int, prompt: int, new: int) -> float:
    """No server of bf16 weights can be faster: prompts bound by products, steps by products or by reading weights.

    A step cannot beat (weights + keys and values) / bandwidth, nor 2 FLOP a weight and token. Weights that stay in the
    processor's cache are read faster than this bandwidth, so a small shape may come out above "100%".
    """
    rate = max(machine["flops_fp32"], machine.get("flops_bf16", 0))
    flops = 2 * shape.linear_parameters * at_once
    read = 2 * shape.linear_parameters + at_once * (prompt + new / 2) * shape.kv_bytes
    step = max(read / machine["bandwidth"], flops / rate)
    return at_once * new / (prompt * flops / rate + new * step)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of five runs after one."""
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
