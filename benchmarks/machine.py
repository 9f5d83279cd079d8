"""What a benchmark says of the machine it ran on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, load, torch, and the GPU where there is one."""
    device = torch.device(device)
    told: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        told["cpu"] = lines[0].partition(":")[2].strip() if lines else told["cpu"]
    told |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        told["gpu"] = torch.cuda.get_device_name(device)
    if hasattr(os, "getloadavg"):
        told["load_average"] = round(os.getloadavg()[0], 2)
    return told
