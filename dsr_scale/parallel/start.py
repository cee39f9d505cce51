"""Puts a rank's part of the network under DeepSpeed, with every setting that training relies on.

Which of DeepSpeed's optimizers works is decided by stage and precision: bf16 at stage 1 has one that
accumulates gradients in fp32 (and needs `immediate_grad_update`, or its step fails on an empty
list); everything else is the flat partition of stages 1 and 2, or that of stage 3.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
import torch.distributed as dist

from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.training import TrainingConfig, ema_name
from dsr_scale.parallel import fragments
from dsr_scale.parallel.assemble import LocalModel, Network, parameter_groups
from dsr_scale.parallel.groups import Axis, Ranks
from dsr_scale.parallel.guard import GuardedAdamW, StepGuard
from dsr_scale.parallel.pipeline import Pipeline
from dsr_scale.parallel.zero import MOMENTS, ZeroEngine

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default: gradients are reduced in groups of up to this many elements."""

PREFETCH_ELEMENTS = 50_000_000
"""DeepSpeed's default: weights that stage 3 gathers ahead. Where forward turns to backward, these are
still there and not gathered again."""


def start_zero(
    local: LocalModel[Network],
    pipeline: Pipeline | None,
    training: TrainingConfig,
    parallel: ParallelConfig,
    *,
    ranks: Ranks,
    accumulation_steps: int,
) -> ZeroEngine[Network]:
    """The engine over this rank's part; equal parts must hold equal weights on every replica."""
    import deepspeed

    # On CPU DeepSpeed would compile a shared-memory kernel with a C++ compiler at start; only its
    # inference path uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It warns of an optimizer that it did not make, and prints memory at every start in bf16.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    settings = training.optimizer
    decay, spared = parameter_groups(local.network)
    groups = [
        {"params": decay, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizer = GuardedAdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )
    network = local.network.to(ranks.device)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_config(
                training,
                parallel,
                accumulation_steps,
                parameters=sum(parameter.numel() for parameter in network.parameters()),
                pin_memory=ranks.device.type == "cuda",
            ),
            mpu=None if ranks.replica.size == 1 else _Topology(ranks),
            dist_init_required=None,
        )
    zero: Any = engine.optimizer
    for partition in fragments.master_partitions(zero):
        optimizer.state[partition] = {
            "step": torch.zeros((), device=partition.device),
            **{moment: torch.zeros_like(partition.detach()) for moment in MOMENTS},
            **{ema_name(d): partition.detach().clone() for d in training.ema_decays},
        }
    if parallel.zero < 3:
        # Links parameters to the state just made; DeepSpeed would do it after its first step.
        zero._lazy_init_hp_params_optimizer_state()
    guard = StepGuard(
        training.skip, ranks.device, dist.group.WORLD if ranks.world_size > 1 else None
    )
    return ZeroEngine(
        engine, optimizer, local, pipeline, guard, ema_decays=training.ema_decays, ranks=ranks
    )


def deepspeed_config(
    training: TrainingConfig,
    parallel: ParallelConfig,
    accumulation_steps: int,
    *,
    parameters: int,
    pin_memory: bool,
) -> dict[str, Any]:
    """DeepSpeed's settings of a run; `parameters` are those this rank holds."""
    zero: dict[str, Any] = {
        "stage": parallel.zero,
        # DeepSpeed allocates the bucket in full, so a small model must not get the default one.
        "reduce_bucket_size": min(REDUCE_BUCKET_ELEMENTS, parameters),
        # Its linear for stage 3 adds the bias in place to a product that selective recomputation
        # keeps, and would add it twice. It saves memory that recomputation saves anyway.
        "memory_efficient_linear": training.recompute != "selective",
        # Stage 3 holds a module's weights while it runs and no longer, so that memory and traffic
        # are those that `plan` prints: by default models under 10⁹ parameters are kept whole.
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
        "stage3_param_persistence_threshold": 0,
    }
    if parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.microbatch_images,
        "gradient_accumulation_steps": accumulation_steps,
        # `step()` is the boundary, so that a pipeline schedule may run the micro-batches before.
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # AdamW of torch steps on the host as well, and needs no C++ compiler there.
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": training.optimizer.gradient_clip or 0.0,
        "steps_per_print": 1_000_000_000,
    }
    if training.precision == "bf16":
        # Without immediate_grad_update the step fails on an empty list of gradients. With offload a
        # gradient that is not finite must be refused early: past that point it stays in host buffers.
        settings["bf16"] = {
            "enabled": True,
            "immediate_grad_update": True,
            "check_grad_overflow": parallel.offload,
        }
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # Stages 2 and 3 reduce every micro-batch: in bf16 the sum over many ranks would lose digits.
        settings["communication_data_type"] = "fp32"
    return settings


class _Topology:
    """What DeepSpeed asks of a "model parallel unit"; "model" is tensor × pipeline."""

    def __init__(self, ranks: Ranks) -> None:
        for name, axis in (
            ("model", ranks.replica),
            ("data", ranks.data),
            ("tensor_model", ranks.tensor),
            ("pipeline_model", ranks.pipeline),
        ):
            self._answer(name, axis)

    def _answer(self, name: str, axis: Axis) -> None:
        answers = {"group": axis.group, "rank": axis.rank, "world_size": axis.size}
        for question, answer in answers.items():
            setattr(self, f"get_{name}_parallel_{question}", lambda answer=answer: answer)
