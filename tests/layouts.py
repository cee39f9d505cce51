"""Steps of a small network on any layout of ranks, with samples that depend on their ids alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsr_scale.base.boxes import Piece
from dsr_scale.base.random_keys import key
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.training import TrainingConfig
from dsr_scale.model.conditioning import Condition
from dsr_scale.parallel import groups
from dsr_scale.parallel.assemble import assemble, make_pipeline
from dsr_scale.parallel.start import start_zero
from dsr_scale.parallel.zero import ZeroEngine
from dsr_scale.train.objective import Example, FlowMatching

GLOBAL_BATCH = 8
TEXT_LENGTH = 6
TRAINING: dict[str, Any] = {
    "precision": "fp32",
    "ema_decays": [0.9, 0.5],
    # Without noise a key bias has no gradient but rounding; a small eps would blow that up.
    "optimizer": {
        "learning_rate": 1e-2,
        "eps": 1e-4,
        "weight_decay": 0.1,
        "gradient_clip": 0.5,
    },
}
SHAPE: dict[str, Any] = {
    "width": 32,
    "depth": 4,
    "heads": 4,
    "head": {"width": 48, "depth": 2, "heads": 4},
    "patch": 1,
    "channels": 6,
    "grid": [4, 4],
    "registers": 4,
    "register_start": 2,
    "conditioning": {"kind": "cross_attention"},
    "text_kind": "features",
    "text_channels": 10,
    "text_length": TEXT_LENGTH,
    "qk_norm": True,
    "attention": "sdpa",
}


class Outcome(NamedTuple):
    """What steps on a layout came to."""

    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]
    """Every tensor of the training state, by global name."""


def example(shape: ModelShape, ids: list[int]) -> Example:
    """A micro-batch of these samples."""

    def draw(purpose: str, sample: int, *size: int) -> Tensor:
        generator = torch.Generator().manual_seed(key(5, purpose, sample))
        return torch.randn(size, generator=generator)

    height, width = shape.grid
    latents = torch.stack([draw("latents", i, shape.channels, height, width) for i in ids])
    null = torch.tensor([i % 5 == 0 for i in ids])
    if shape.text_kind == "none":
        condition = Condition(null=null, labels=torch.tensor([i % 3 for i in ids]))
    else:
        mask = torch.stack([torch.arange(TEXT_LENGTH) < 2 + i % 4 for i in ids])
        if shape.text_kind == "bytes":
            tokens = torch.stack(
                [(draw("text", i, TEXT_LENGTH) * 40).long().abs() % 256 for i in ids]
            )
        else:
            tokens = torch.stack([draw("text", i, TEXT_LENGTH, shape.text_channels) for i in ids])
        condition = Condition(null=null, tokens=tokens, mask=mask)
    objective = FlowMatching(DiffusionConfig(prediction="velocity"), 1.0, seed=9)
    return Example(objective, latents, condition, tuple(0 for _ in ids), tuple(ids))


def start_engine(
    shape: ModelShape, parallel: dict[str, Any], training: dict[str, Any], *, microbatch: int = 1
) -> tuple[ZeroEngine, groups.Ranks]:
    """The engine of a layout on the ranks that run this."""
    layout = ParallelConfig.model_validate(parallel)
    settings = TrainingConfig.model_validate(
        {
            **TRAINING,
            **training,
            "microbatch_images": microbatch,
            "global_batch_images": GLOBAL_BATCH,
            "device": "cpu",
        }
    )
    ranks = groups.start("cpu", tp=layout.tp, pp=layout.pp)
    local = assemble(shape, seed=1, ranks=ranks, parallel=layout, training=settings)
    _disturb(local.network, local.splits)
    engine = start_zero(
        local,
        make_pipeline(local, ranks, layout),
        settings,
        layout,
        ranks=ranks,
        accumulation_steps=GLOBAL_BATCH // ranks.data.size // microbatch,
    )
    return engine, ranks


@torch.no_grad()
def _disturb(network: torch.nn.Module, splits: dict[str, Any]) -> None:
    """Leaves nothing at zero: an AdaLN that starts there would hide every mistake behind it."""
    for name, parameter in network.named_parameters():
        split = splits[name]
        local = tuple(parameter.shape)
        whole = local if split is None else split.global_shape(local)
        generator = torch.Generator().manual_seed(key(3, name))
        noise = 0.1 * torch.randn(whole, generator=generator)
        parameter.add_(noise if split is None else split.take(noise))


def steps(
    shape_values: dict[str, Any],
    parallel: dict[str, Any],
    training: dict[str, Any],
    microbatch: int = 1,
    number: int = 3,
) -> Outcome:
    """Runs optimizer steps and gathers their state; call it on every rank."""
    shape = ModelShape.model_validate(shape_values)
    engine, ranks = start_engine(shape, parallel, training, microbatch=microbatch)
    learning_rate = {**TRAINING, **training}["optimizer"]["learning_rate"]
    losses, norms = [], []
    for step in range(number):
        loss, norm, skipped = one_step(
            engine, ranks, shape, step, microbatch=microbatch, learning_rate=learning_rate
        )
        assert skipped == 0
        losses.append(loss)
        norms.append(norm)
    return Outcome(losses, norms, whole_state(engine, ranks))


def one_step(
    engine: ZeroEngine,
    ranks: groups.Ranks,
    shape: ModelShape,
    step: int,
    *,
    microbatch: int = 1,
    learning_rate: float = 1e-2,
) -> list[float]:
    """Loss, gradient norm and whether it was skipped, of one step on samples 8·step, 8·step + 1, …"""
    share = GLOBAL_BATCH // ranks.data.size
    first = step * GLOBAL_BATCH + ranks.data.rank * share
    ids = [list(range(i, i + microbatch)) for i in range(first, first + share, microbatch)]
    loss = engine.forward_backward([example(shape, each) for each in ids])
    return engine.step(loss, step=step, learning_rate=learning_rate).tolist()


def whole_state(engine: ZeroEngine, ranks: groups.Ranks) -> dict[str, Tensor]:
    """The state that all ranks hold together, each element written exactly once."""
    mine = [piece._replace(tensor=piece.tensor.clone()) for piece in engine.pieces(owned=True)]
    return assembled(ranks.gather_on_host(mine))


def assembled(pieces: list[Piece]) -> dict[str, Tensor]:
    """Whole tensors of pieces; every element must be there, and once."""
    whole: dict[str, Tensor] = {}
    for name, shape, box, tensor in pieces:
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            target = target.narrow(dim, offset, size)
        assert torch.isnan(target).all(), f"{name} is held twice"
        target.copy_(tensor.view(target.shape))
    for name, tensor in whole.items():
        assert not torch.isnan(tensor).any(), f"a part of {name} is held by nobody"
    return whole
