"""What the machine can do and what this process takes of it."""

import sys
import time
from pathlib import Path

import torch

_BUDGET = 0.4  # seconds
_SIZES = (256, 512, 1024, 2048, 4096, 8192)


def measured_matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of this device in square matrix products, measured: the best of all repeats that fit in half a second.

    What a run can at best reach on this machine, with these threads and clocks, and the scale of its model-flops
    utilisation. Data sheets state more, for conditions that do not last. A multiply-add counts as two.

    Args:
        device: where to measure; waits for what is queued there.
        dtype: precision of the operands (bfloat16 for a run under bf16 autocast); float32 follows torch's setting of
            `set_float32_matmul_precision`.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)  # constants would draw less power, and so clock higher
    end = time.perf_counter() + _BUDGET
    best = 0.0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for size in _SIZES:
            left = torch.randn(size, size, device=device, generator=generator).to(dtype)
            right = left.t().contiguous()
            product = left @ right  # makes handles and picks kernels
            shortest = _timed(left, right, product, device)
            more = len(_SIZES) if size < _SIZES[-1] else 100
            for _ in range(more):
                if time.perf_counter() + shortest > end:
                    break
                shortest = min(shortest, _timed(left, right, product, device))
            best = max(best, 2 * size**3 / shortest)
            if time.perf_counter() + 3 * 8 * shortest > end:  # the next size does 8 times the work
                break
    return best


def _timed(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    torch.mm(left, right, out=out)
    _wait(device)
    return max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device | str) -> float | None:
    """The most memory used so far, in bytes.

    On CUDA what torch's allocator held for tensors on the device, elsewhere this process's resident memory (its
    high-water mark). None where the system does not tell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        # Not getrusage: its mark is inherited from the program that was replaced by this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) if sys.platform == "darwin" else float(peak) * 1024


def memory_name(device: torch.device | str) -> str:
    """What `peak_memory` is of: "GPU memory" or "process memory"."""
    return "GPU memory" if torch.device(device).type == "cuda" else "process memory"
