"""Benchmarks, which lie outside the package, as modules."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@contextmanager
def benchmark(name: str) -> Iterator[ModuleType]:
    """`benchmarks/<name>.py` as a module; what it sets of torch for a whole process is set back."""
    sys.path.insert(0, str(FOLDER))  # for the modules beside it
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        sys.path.remove(str(FOLDER))
        del sys.modules[spec.name]
