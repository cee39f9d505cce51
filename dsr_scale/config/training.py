"""The optimizer, its schedule, and how a run is saved, sampled and tracked."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.config.section import Section

MomentDecay = Annotated[float, Field(ge=0, lt=1)]
EmaDecay = Annotated[float, Field(ge=0, lt=1)]


def ema_name(decay: float) -> str:
    """What an average is called in checkpoints, without a dot: 0.9999 is `ema_9999`."""
    digits = f"{Decimal(repr(decay)):f}".partition(".")[2]
    return f"ema_{digits}"


def _class_number_as_text(prompt: Any) -> Any:
    return str(prompt) if type(prompt) is int else prompt


class OptimizerConfig(Section):
    """AdamW; weight decay reaches matrices only (no norm, bias, embedding or register)."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak rate."""
    betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; None is off."""


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, flat, then a decay."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps from 0 to the peak rate."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay."""
    decay_start_step: int = Field(default=0, ge=0)
    """First step of the decay; the warm-up's end if that is later."""
    decay_end_step: int | None = Field(default=None, gt=0)
    """Step at which the final rate is reached; None is the run's last step."""
    final_learning_rate: float = Field(default=0.0, ge=0)
    """Rate at the end of the decay and after it."""


class SkipConfig(Section):
    """Steps that are not taken, on all ranks alike; each is counted and its sample ids are logged."""

    spike_deviations: float | None = Field(default=None, gt=0)
    """Skip a step whose loss or gradient norm lies more than this many standard deviations above its
    running mean; None skips only what is not finite."""
    window_steps: int = Field(default=200, gt=1)
    """Memory of the running mean and deviation, which decay exponentially. Spikes are not judged
    before that many applied steps."""
    most_in_a_row: int = Field(default=20, gt=0)
    """That many skipped steps in a row end the run."""


class TrainingConfig(Section):
    """One optimizer step uses exactly `global_batch_images`, however many devices share it."""

    steps: int = Field(default=100_000, gt=0)
    """Optimizer steps of the run."""
    global_batch_images: int = Field(default=1024, gt=0)
    """Images per optimizer step, over all devices."""
    microbatch_images: int = Field(default=32, gt=0)
    """Images per device and forward; the rest is gradient accumulation."""
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    """`bf16` keeps fp32 master weights and accumulates gradients in fp32. `tf32` has fp32 weights, and
    matrix products in TF32 on GPUs that have it; on a CPU it equals `fp32`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA where there is one."""
    compile: bool = False
    """torch.compile of each block; needs a C compiler on the machine."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decays: tuple[EmaDecay, ...] = Field(default=(0.9999,), min_length=1)
    """Averages of the weights, all kept at once, in fp32. The first is the one used for sampling,
    evaluation and export unless another is named. Half-life in steps is ln 2 / (1 − decay); early
    steps use min(decay, (1+step)/(10+step))."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping. `selective` keeps matrix products and
    attention and recomputes element-wise work; `full` keeps each block's input alone."""
    skip: SkipConfig = SkipConfig()


class CheckpointConfig(Section):
    """Sharded checkpoints by global name; the newest complete one wins on start."""

    every_steps: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""
    keep_last: int = Field(default=3, gt=0)
    """Newest checkpoints that stay on disk."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoints at multiples of this are never removed."""
    allow_changed: tuple[str, ...] = ()
    """Dotted names of settings that a resume may find changed although they decide what is learned,
    such as `data.fingerprint` (another data set) or `diffusion.prediction`."""


class GridConfig(Section):
    """Samples of the EMA weights for fixed prompts and seeds while training."""

    every_steps: int | None = Field(default=None, gt=0)
    """None draws none."""
    prompts: tuple[Annotated[str, BeforeValidator(_class_number_as_text)], ...] = ()
    """Captions, or class numbers for class conditioning."""
    sampling: SamplingConfig = SamplingConfig()


class TrackingConfig(Section):
    """Where metrics go besides the run directory's `metrics.jsonl`."""

    log_every_steps: int = Field(default=10, gt=0)
    """Steps between logged metrics."""
    norms_every_steps: int | None = Field(default=100, gt=0)
    """Steps between token norms of every block; a multiple of `log_every_steps`. None measures none."""
    timestep_buckets: int = Field(default=4, gt=0)
    """Equal parts of [0, 1] by which losses and token norms are told apart."""
    wandb: Literal["offline", "online", "off"] = "offline"
    """`offline` writes files to upload later and needs no key."""
    project: str = "dsr-scale"
    """Project in wandb."""
