"""Adan, the EDT authors' optimizer.

Xie et al. 2022, "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models", arXiv 2208.06677,
algorithm 1. It is written here in plain PyTorch: the published implementation needs a compiled CUDA extension for its
fast path.
"""

# torch does not export the multi-tensor operations, though its own optimizers consist of them.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sharding import local


class Adan(torch.optim.Optimizer):
    """Adaptive Nesterov momentum with decoupled, proximal weight decay.

    Update k = 1, 2, ... of a parameter p with gradient g and difference D = g_k - g_{k-1} (0 at its first gradient)::

        m = b1 m + (1 - b1) g        d = b2 d + (1 - b2) D        v = b3 v + (1 - b3) (g + b2 D)^2
        p = (p - lr (m / (1 - b1^k) + b2 d / (1 - b2^k)) / (sqrt(v / (1 - b3^k)) + eps)) / (1 + lr weight_decay)

    The betas are written as in the authors' code; the paper calls (1 - b1, 1 - b2, 1 - b3) beta. State per parameter:
    `exp_avg` (m), `exp_avg_sq` (v), `exp_avg_diff` (d) and `neg_pre_grad` (-g_{k-1}), each of the parameter's shape and
    dtype. k is the entry `step` of the parameter group.

    A parameter without a gradient is skipped and its state stays as it is. Where a gradient appears late, D is 0 at
    that first time, and the bias corrections are those of the group's k, hence close to 1: its first updates are
    smaller than at k = 1. Where a gradient was missing in between, D is the difference to the last gradient seen.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate, not negative.
        betas: (b1, b2, b3), each in [0, 1).
        eps: added to the denominator, not negative.
        weight_decay: not negative.
        max_grad_norm: if positive, gradients are multiplied by min(1, max_grad_norm / (norm + eps)), norm taken over
            all parameters of all groups; `.grad` itself is left as it is. The norm is that of the gradients this
            process holds: with sharded gradients (FSDP, DeepSpeed) leave it at 0 and clip in the training loop.
        foreach: update all tensors by a few multi-tensor operations instead of one by one; the same numbers, faster on
            a GPU. On a CPU each such operation streams all weights through the caches anew and is the slower way by
            half. None is by device.

    Raises:
        ValueError: if a hyperparameter is outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "foreach": foreach,
            "step": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, whose own k starts at 0.

        Raises:
            ValueError: if a hyperparameter of the group is outside its range.
        """
        _check_adan({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update.

        Args:
            closure: computes the loss and its gradients again, or None.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self._grad_norm()
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            if any(g.is_sparse for g in grads):
                raise ValueError("Adan has no update for sparse gradients: build the embedding with sparse=False")
            if norm is not None and group["max_grad_norm"] > 0:
                scale = (group["max_grad_norm"] / (norm + group["eps"])).clamp(max=1.0)
                grads = list(torch._foreach_mul(grads, scale))
            states = [self._state_of(p, g) for p, g in zip(params, grads, strict=True)]
            foreach = params[0].device.type != "cpu" if group["foreach"] is None else group["foreach"]
            update = _update_foreach if foreach else _update_each
            # Every element's update is its own: each process of a sharded run makes that of its part.
            update(
                [local(p) for p in params],
                [local(g) for g in grads],
                [{name: local(value) for name, value in state.items()} for state in states],
                group,
            )
        return loss

    def _grad_norm(self) -> Tensor | None:
        """L2 norm over the gradients of all groups; None if no group clips."""
        if not any(group["max_grad_norm"] > 0 for group in self.param_groups):
            return None
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads) if grads else None

    def _state_of(self, param: Tensor, grad: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff"):
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["neg_pre_grad"] = grad.neg()
        return state


def _factors(group: dict[str, Any]) -> tuple[float, float, float, float]:
    """Step sizes of m and of d, divisor of sqrt(v), divisor of the weight decay."""
    b1, b2, b3 = group["betas"]
    k, lr = group["step"], group["lr"]
    return (
        lr / (1.0 - b1**k),
        lr * b2 / (1.0 - b2**k),
        math.sqrt(1.0 - b3**k),
        1.0 + lr * group["weight_decay"],
    )


def _update_each(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> None:
    b1, b2, b3 = group["betas"]
    step_m, step_d, root, decay = _factors(group)
    for p, g, state in zip(params, grads, states, strict=True):
        m, v, d = state["exp_avg"], state["exp_avg_sq"], state["exp_avg_diff"]
        difference = state["neg_pre_grad"].add_(g)
        m.mul_(b1).add_(g, alpha=1.0 - b1)
        d.mul_(b2).add_(difference, alpha=1.0 - b2)
        ahead = difference.mul_(b2).add_(g)
        v.mul_(b3).addcmul_(ahead, ahead, value=1.0 - b3)
        denominator = v.sqrt().div_(root).add_(group["eps"])
        p.addcdiv_(m, denominator, value=-step_m)
        p.addcdiv_(d, denominator, value=-step_d)
        p.div_(decay)
        state["neg_pre_grad"].copy_(g).neg_()


def _update_foreach(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> None:
    b1, b2, b3 = group["betas"]
    step_m, step_d, root, decay = _factors(group)
    m, v, d, previous = (
        [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")
    )
    # `previous` holds, in turn, -g_{k-1}, D, g + b2 D and -g_k: no temporary of the parameters' size but one.
    torch._foreach_add_(previous, grads)
    torch._foreach_mul_(m, b1)
    torch._foreach_add_(m, grads, alpha=1.0 - b1)
    torch._foreach_mul_(d, b2)
    torch._foreach_add_(d, previous, alpha=1.0 - b2)
    torch._foreach_mul_(previous, b2)
    torch._foreach_add_(previous, grads)
    torch._foreach_mul_(v, b3)
    torch._foreach_addcmul_(v, previous, previous, value=1.0 - b3)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_div_(denominator, root)
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_addcdiv_(params, m, denominator, value=-step_m)
    torch._foreach_addcdiv_(params, d, denominator, value=-step_d)
    torch._foreach_div_(params, decay)
    torch._foreach_copy_(previous, grads)
    torch._foreach_neg_(previous)


def _check_adan(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
        if not (math.isfinite(group[name]) and group[name] >= 0.0):
            raise ValueError(f"{name} = {group[name]}: expected a finite number that is not negative")
    if len(group["betas"]) != 3 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(
            f"betas = {group['betas']}: expected three numbers in [0, 1), such as (0.98, 0.92, 0.99); these are one "
            "minus the paper's"
        )
