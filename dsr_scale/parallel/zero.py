"""The model under DeepSpeed ZeRO-1: AdamW, clipping, EMA, and its state by global parameter name.

DeepSpeed flattens parameters into partitions; this module is the only place that knows it. Others
see `weights`, `exp_avg`, `exp_avg_sq` and `ema` as full fp32 tensors under the parameter's own
name, so that a checkpoint does not depend on how many ranks wrote it. Gathering one tensor at a
time bounds the extra memory by the largest parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from dsr_scale.config.training import TrainingConfig
from dsr_scale.parallel import ema
from dsr_scale.parallel.groups import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
NO_CLIPPING = 1e30
"""A limit, however large, makes DeepSpeed look at the norm and skip a step that is not finite."""

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default: gradients are reduced in groups of up to this many elements."""

KINDS = ("weights", *MOMENTS, ema.EMA)
"""Every fp32 tensor that a parameter owns during training."""


class StepOutcome(NamedTuple):
    """What one optimizer step did."""

    gradient_norm: float
    """Over the whole model, before clipping."""
    applied: bool
    """False when the gradient was not finite."""


class ZeroEngine:
    """One model in training. All ranks call every method together."""

    def __init__(self, engine: Any, *, ema_decay: float) -> None:
        self._engine = engine
        self._ema_decay = ema_decay
        self._parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())

    @property
    def model(self) -> nn.Module:
        """The network, in the training precision; call it for the forward pass."""
        return self._engine.module

    def backward(self, loss: torch.Tensor, *, accumulation_steps: int) -> None:
        """Adds the gradient of one micro-batch's mean loss to the step's."""
        self._engine.backward(loss / accumulation_steps, scale_wrt_gas=False)

    def step(self, *, step: int, learning_rate: float) -> StepOutcome:
        """Clips, updates weights and EMA; `step` counts from 0.

        A gradient that is not finite changes nothing, on all ranks alike.
        """
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        applied = self._engine.was_step_applied()
        if applied:
            ema.update(optimizer, ema.decay_at(step, self._ema_decay))
        return StepOutcome(float(self._engine.get_global_grad_norm()), applied)

    def full_tensors(self, kinds: Iterable[str] = KINDS) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (`kind.name`, fp32 tensor) for every parameter, then (`buffers.name`, tensor).

        A collective: every rank must exhaust it.
        """
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
        )

        for kind in kinds:
            for name, parameter in self._parameters.items():
                if kind == "weights":
                    tensor = safe_get_full_fp32_param(parameter)
                else:
                    tensor = safe_get_full_optimizer_state(parameter, kind)
                assert tensor is not None, f"{name} is not under ZeRO"
                yield f"{kind}.{name}", tensor
        for name in _persistent_buffers(self.model):
            yield f"buffers.{name}", self.model.get_buffer(name)

    def shapes(self) -> dict[str, torch.Size]:
        """Name and shape of everything `full_tensors` yields, without gathering."""
        shapes = {f"{kind}.{n}": p.shape for kind in KINDS for n, p in self._parameters.items()}
        for name in _persistent_buffers(self.model):
            shapes[f"buffers.{name}"] = self.model.get_buffer(name).shape
        return shapes

    @torch.no_grad()
    def restore(self, name: str, tensor: torch.Tensor) -> None:
        """Sets what `full_tensors` yielded under `name`; `tensor` is full and equal on every rank."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        kind, _, parameter_name = name.partition(".")
        if kind == "buffers":
            self.model.get_buffer(parameter_name).copy_(tensor)
            return
        parameter = self._parameters[parameter_name]
        tensor = tensor.to(parameter.device)
        if kind == "weights":
            safe_set_full_fp32_param(parameter, tensor)
            parameter.data.copy_(tensor)
        else:
            safe_set_full_optimizer_state(parameter, tensor, kind)

    def restore_step_count(self, steps: int) -> None:
        """Sets AdamW's bias-correction count to `steps` applied steps."""
        for state in self._optimizer.state.values():
            state["step"].fill_(float(steps))

    @torch.no_grad()
    def gather_ema(self, model: nn.Module | None) -> None:
        """Gathers EMA weights and buffers into `model`, a copy of the network in any precision.

        A collective; ranks that want no copy pass None.
        """
        parameters = {} if model is None else dict(model.named_parameters())
        for name, tensor in self.full_tensors((ema.EMA,)):
            if model is None:
                continue
            kind, _, target = name.partition(".")
            (parameters[target] if kind == ema.EMA else model.get_buffer(target)).copy_(tensor)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer


def _persistent_buffers(model: nn.Module) -> list[str]:
    saved = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name in saved]


def start_zero(
    model: nn.Module,
    groups: tuple[list[nn.Parameter], list[nn.Parameter]],
    config: TrainingConfig,
    *,
    ranks: Ranks,
    accumulation_steps: int,
) -> ZeroEngine:
    """Puts `model` under ZeRO-1; `groups` are its decayed and undecayed parameters.

    The model's weights must be equal on every rank (they are built from one seed).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # On CPU DeepSpeed would compile a shared-memory kernel with a C++ compiler at start; only its
    # inference path uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": settings.weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )
    engine, *_ = deepspeed.initialize(
        model=model.to(ranks.device),
        optimizer=optimizer,
        config=_deepspeed_config(
            config, accumulation_steps, parameters=sum(p.numel() for p in model.parameters())
        ),
        dist_init_required=None,
    )
    zero_optimizer: Any = engine.optimizer
    inner = zero_optimizer.optimizer
    for group in inner.param_groups:
        for partition in group["params"]:
            inner.state[partition] = {
                "step": torch.tensor(0.0),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
                ema.EMA: partition.detach().clone(),
            }
    # Links parameters to the state just made; DeepSpeed would do it after its first step.
    zero_optimizer._lazy_init_hp_params_optimizer_state()
    return ZeroEngine(engine, ema_decay=config.ema_decay)


def _deepspeed_config(
    config: TrainingConfig, accumulation_steps: int, *, parameters: int
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.microbatch_images,
        "gradient_accumulation_steps": accumulation_steps,
        # `step()` is the boundary, so that a pipeline schedule may run the micro-batches later.
        "managed_gradient_accumulation": False,
        # DeepSpeed allocates the bucket in full, so a small model must not get the default one.
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": min(REDUCE_BUCKET_ELEMENTS, parameters),
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.optimizer.gradient_clip or NO_CLIPPING,
        "steps_per_print": 1_000_000_000,
    }
    if config.precision == "bf16":
        # Without immediate_grad_update the step fails on an empty list of gradients.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
