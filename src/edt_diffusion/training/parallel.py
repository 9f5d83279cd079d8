"""How one network is trained by one process or by many: plain, DDP, or sharded by torch's FSDP2.

accelerate brings processes together and supplies precision, the loss scaler and DDP. Sharding is torch's own
`fully_shard`, applied here: accelerate's FSDP plugin is ignored without a word on a CPU, and one code path for every
device is one that can be tested.
"""

import json
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from ..util.errors import UserError
from .config import TrainConfig
from .sharding import is_sharded, local, whole


def refuse_unsupported(config: TrainConfig) -> None:
    """Refuse what a backend would not do, or would silently leave undone.

    Raises:
        UserError: fp16 on a CPU, sharding over one process, accelerate's FSDP plugin, a DeepSpeed file that cannot be
            used, and the like.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "train.mixed_precision=fp16 needs a GPU (it is a hundred times slower on a CPU): use bf16 or no"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.sharding == "fsdp2":
        if processes < 2:
            raise UserError(
                "train.sharding=fsdp2 needs at least two processes, this is one: start the run with "
                "torchrun --nproc_per_node N -m edt_diffusion train ..., or leave it out"
            )
        if config.mixed_precision == "fp16":
            raise UserError("train.sharding=fsdp2 with train.mixed_precision=fp16 is not supported: use bf16 or no")
        if config.compile:
            raise UserError("train.sharding=fsdp2 with train.compile=true is not supported: leave one of them out")
    if _asked_of_accelerate("ACCELERATE_USE_FSDP"):
        raise UserError(
            "accelerate was configured for FSDP, which it ignores on a CPU and which this program does itself: "
            "set train.sharding=fsdp2 and choose multi-process without FSDP in accelerate config"
        )
    if _asked_of_accelerate("ACCELERATE_USE_DEEPSPEED") and config.deepspeed is None:
        raise UserError("accelerate was configured for DeepSpeed: name its configuration with train.deepspeed=FILE")
    if config.deepspeed is not None and config.sharding != "none":
        raise UserError("train.deepspeed and train.sharding were both given: give one of them")
    if config.deepspeed is not None:
        _refuse_deepspeed(config.deepspeed)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Join the processes of the job.

    Raises:
        UserError: for settings that cannot be had, or processes that do not find each other.
    """
    refuse_unsupported(config)
    torch.set_float32_matmul_precision(config.matmul_precision)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    _allow_precision(config.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # Told nothing, accelerate runs processes without a GPU as so many single ones, all in one run folder.
        cpu=processes > 1 and not torch.accelerator.is_available(),
        deepspeed_plugin=None if config.deepspeed is None else _deepspeed_plugin(config),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.num_processes != processes:
        raise UserError(
            f"{processes} processes were launched, but accelerate joins {accelerator.num_processes}: start the run "
            "with torchrun --nproc_per_node N -m edt_diffusion train ..., or accelerate launch after accelerate config"
        )
    return accelerator


class Parallel:
    """A network and its optimizer as the processes of a job hold them.

    Args:
        accelerator: the job.
        network: the bare network; moved to the device, and sharded or compiled in place as the settings say.
        config: settings of the loop.

    Attributes:
        network: the bare network; under sharding its parameters are `DTensor`s.
        model: what is called in training; wraps the network under DDP.
        sharded: whether every process must take part in a forward pass.
    """

    def __init__(self, accelerator: Accelerator, network: Any, config: TrainConfig) -> None:
        self.accelerator = accelerator
        self.network = network.to(accelerator.device)
        self.sharded = config.sharding == "fsdp2"
        if config.gradient_checkpointing:
            self.network.set_checkpointed_stages(config.gradient_checkpointing)
        if config.compile:
            self.network.compile_repeated_blocks(fullgraph=True)
        if self.sharded:
            _shard(self.network, accelerator)
        self.model: Any = self.network

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Wrap network and optimizer; the optimizer is built over the network's parameters, sharded ones included."""
        if self.sharded:
            return self.accelerator.prepare(optimizer)
        self.model, prepared = self.accelerator.prepare(self.network, optimizer)
        return prepared

    def exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Around one forward and backward: gradients are exchanged with the last micro-batch of a step only."""
        if self.sharded:
            self.network.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def forget_gathered(self) -> None:
        """Drop whole weights that a forward pass without gradients has left: the sharded ones have changed."""
        if self.sharded:
            self.network.reshard()

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, float32, the same in all processes."""
        gradients = self._gradients()
        if not gradients:
            return torch.zeros((), device=self.accelerator.device)
        return whole(torch.nn.utils.get_total_norm(gradients)).float()

    def clip(self, largest: float, norm: Tensor) -> None:
        """Scale the gradient down to norm `largest` if `norm`, its own, is greater."""
        gradients = [local(gradient) for gradient in self._gradients()]
        if gradients:
            torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))

    def gradients(self) -> list[Tensor]:
        """This process's part of every gradient."""
        return [local(gradient) for gradient in self._gradients()]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.network.parameters() if p.grad is not None]

    def parts(self, tensors: Any) -> list[Tensor]:
        """This process's part of tensors."""
        return [local(tensor) for tensor in tensors]

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; every process must call it."""
        if self.accelerator.num_processes == 1:
            return flag
        told = torch.tensor([float(flag)], device=self.accelerator.device)
        return float(self.accelerator.reduce(told, reduction="sum")) > 0  # pyright: ignore[reportArgumentType]


def _shard(network: Any, accelerator: Accelerator) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    units = set(network._no_split_modules or ())
    for module in network.modules():
        if type(module).__name__ in units:
            fully_shard(module, mesh=mesh)
        if hasattr(module, "keep_gathered"):
            module.keep_gathered = False  # the table it was gathered from comes and goes
    fully_shard(network, mesh=mesh)
    assert all(is_sharded(parameter) for parameter in network.parameters())


def _allow_precision(precision: str) -> None:
    """Let a Python process train at another precision than before: accelerate keeps the first one for all its jobs.

    A new state instead of the old one emptied, because earlier jobs hold on to theirs.
    """
    known = AcceleratorState._shared_state
    if isinstance(known, dict) and known.get("_mixed_precision", precision) != precision:
        AcceleratorState._shared_state = {}


def _asked_of_accelerate(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _refuse_deepspeed(file: str) -> None:
    try:
        settings = json.loads(Path(file).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"train.deepspeed={file} cannot be read ({error.strerror}): name a DeepSpeed file") from None
    except ValueError as error:
        raise UserError(f"train.deepspeed={file} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"train.deepspeed={file} holds no JSON object: expected DeepSpeed's settings")
    if find_spec("deepspeed") is None:
        raise UserError(f"train.deepspeed={file} needs DeepSpeed: pip install deepspeed, or leave it out")


def _deepspeed_plugin(config: TrainConfig) -> Any:
    """accelerate's plugin around a DeepSpeed configuration; never tried for want of the hardware."""
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin(hf_ds_config=config.deepspeed)
