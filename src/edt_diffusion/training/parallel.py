"""How one network is trained by one process or by many: plain, DDP, or sharded by torch's FSDP2.

accelerate brings processes together and supplies precision, the loss scaler and DDP. Sharding is torch's own
`fully_shard`, applied here: accelerate's FSDP plugin is ignored without a word on a CPU, and one code path for every
device is one that can be tested.
"""

import functools
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
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
        _refuse_deepspeed(config.deepspeed, config)


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
        self.deepspeed = config.deepspeed is not None
        if config.gradient_checkpointing:
            self.network.set_checkpointed_stages(config.gradient_checkpointing)
        if config.compile:
            self.network.compile_repeated_blocks(fullgraph=True)
        if self.sharded:
            _shard(self.network, accelerator)
        self.model: Any = self.network

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        if self.deepspeed:
            self.model.backward(loss)  # accelerate's would make the update too
        else:
            self.accelerator.backward(loss)

    def apply(self, optimizer: Any) -> None:
        """Make the update."""
        if self.deepspeed:
            self.model.step()
        else:
            optimizer.step()

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Wrap network and optimizer; the optimizer is built over the network's parameters, sharded ones included."""
        if self.sharded:
            self._autocast_calls()
            return self.accelerator.prepare(optimizer)
        self.model, prepared = self.accelerator.prepare(self.network, optimizer)
        return prepared

    def _autocast_calls(self) -> None:
        """Run every forward pass in the run's precision, as accelerate has it for networks that it prepares."""
        forward = self.network.forward

        @functools.wraps(forward)
        def autocast(*arguments: Any, **options: Any) -> Any:
            with self.accelerator.autocast():
                return forward(*arguments, **options)

        if self.accelerator.mixed_precision != "no":
            self.network.forward = autocast

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

    def told_by_main(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the main process, in all; every process must call it.

        Raises:
            UserError: the one that `make` raised there, in all processes.
        """
        if self.accelerator.num_processes == 1:
            return make()
        box: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        broadcast_object_list(box)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

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


def _refuse_deepspeed(file: str, config: TrainConfig) -> None:
    try:
        settings = json.loads(Path(file).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"train.deepspeed={file} cannot be read ({error.strerror}): name a DeepSpeed file") from None
    except ValueError as error:
        raise UserError(f"train.deepspeed={file} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"train.deepspeed={file} holds no JSON object: expected DeepSpeed's settings")
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (0, "0"):
        raise UserError(
            f"train.deepspeed={file} asks for ZeRO stage {stage}, which is not supported (averages and checkpoints "
            "need whole weights): use stage 0, or train.sharding=fsdp2 without DeepSpeed"
        )
    if config.micro_batches > 1:
        raise UserError("train.deepspeed with train.micro_batches above 1 is not supported: leave one of them out")
    if find_spec("deepspeed") is None:
        raise UserError(f"train.deepspeed={file} needs DeepSpeed: pip install deepspeed, or leave it out")


def _deepspeed_plugin(config: TrainConfig) -> Any:
    """accelerate's plugin around a DeepSpeed configuration; never tried for want of the hardware."""
    from accelerate.utils import DeepSpeedPlugin

    settings = json.loads(Path(str(config.deepspeed)).read_text("utf-8"))
    local = config.batch_size // int(os.environ.get("WORLD_SIZE", "1"))
    settings |= {"train_micro_batch_size_per_gpu": local, "gradient_accumulation_steps": 1}
    return DeepSpeedPlugin(hf_ds_config=settings)
