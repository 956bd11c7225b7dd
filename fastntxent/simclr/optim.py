"""LARS, the warm-up and cosine schedule, and the parameter groups of SimCLR."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


class LARS(Optimizer):
    """SGD with momentum that scales the step of each tensor to the size of its weights (You et al. 2017).

        d = g + weight_decay * w
        m = momentum * m + lr * trust * ||w|| / ||d|| * d
        w = w - m

    A group with `adapt=False` (biases and normalisation parameters, in SimCLR) is plain SGD with momentum. The factor
    trust * ||w|| / ||d|| is 1 if either norm is zero.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                update = w.grad.add(w, alpha=group["weight_decay"])
                if group["adapt"]:
                    update = update * _trust_ratio(w, update, group["trust"])
                state = self.state[w]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(w)
                state["momentum"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                w.sub_(state["momentum"])


def _trust_ratio(w: Tensor, update: Tensor, trust: float) -> Tensor:
    w_norm, update_norm = w.norm(), update.norm()
    # torch.where instead of `if` keeps the norms on the device.
    return torch.where((w_norm > 0) & (update_norm > 0), trust * w_norm / update_norm, 1.0)


def build_optimizer(
    optimizer: str, modules: Iterable[nn.Module], lr: float, weight_decay: float, momentum: float
) -> Optimizer:
    """Return AdamW or LARS for the modules' parameters.

    Vectors and scalars (biases, BatchNorm, a learnt temperature) get neither weight decay nor LARS's trust ratio.
    """
    params = [p for module in modules for p in module.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if optimizer == "adamw":
        return AdamW(groups, lr=lr)
    groups[1]["adapt"] = False
    return LARS(groups, lr=lr, momentum=momentum)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the rate at 0-based `step`: linear up to `peak` over `warmup` steps, then half a cosine towards 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def default_learning_rate(optimizer: str, batch: int) -> float:
    """Return 3e-3 for AdamW, and for LARS 0.075 sqrt(batch), the paper's rule for small batches (appendix B.1)."""
    return 3e-3 if optimizer == "adamw" else 0.075 * math.sqrt(batch)
