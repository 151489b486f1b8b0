"""AdamW with the contract of Transformer Engine's and apex's FusedAdam, in plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT


def stand_in_for_fused_adam() -> None:
    """Give Megatron this Adam if neither apex nor Transformer Engine is installed; idempotent.

    Otherwise it would use torch's, which its distributed optimizer cannot resume.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not distributed.HAVE_APEX_OR_TE:
        optimizer.Adam = distributed.Adam = Adam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


class Adam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980) with decoupled weight decay (arXiv:1711.05101) unless `adam_w_mode` is off.

    Megatron's distributed optimizer expects FusedAdam's contract: the parameter group holds one step count, and the
    state only `exp_avg` and `exp_avg_sq`. torch.optim.Adam keeps a step per parameter, which Megatron neither saves nor
    restores: the run would resume with the bias corrections of step 0 and silently diverge.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        assert not capturable, "this Adam cannot be captured in a CUDA graph"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "Megatron steps without a closure"
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        learning_rate, weight_decay, step = group["lr"], group["weight_decay"], group["step"]
        state, grad = self.state[param], param.grad
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if self.adam_w_mode:
            param.mul_(1 - learning_rate * weight_decay)
        else:
            grad = grad + weight_decay * param
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        param.addcdiv_(state["exp_avg"], denominator, value=-learning_rate / (1 - beta1**step))
