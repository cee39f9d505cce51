"""CPU time of tensor and pipeline ranks, summed, against one process with the same global batch.

What a split adds has three parts, and each has a row of its own to tell it by. Two busy cores get in
each other's way: two processes that know nothing of each other, side by side, for the price of one.
Ranks repeat work (norms, residuals, conditioning, noise): the same ranks with their messages left out,
which trains nothing and costs all the rest. What is left is the messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsr_scale.config.parallel import ParallelConfig
from tools.bench import workload
from tools.bench.protocol import (
    Aim,
    Comparison,
    Report,
    Row,
    Sample,
    Samples,
    Settings,
    Variant,
    compare,
    interleave,
)
from tools.bench.ranks import RankGroup, Step

AIM = Aim(high=1.25)
TINY: dict[str, int] = {"width": 32, "depth": 2, "heads": 2, "grid": 4, "registers": 4}
SIZES: tuple[dict[str, int], ...] = (
    {"width": 384, "depth": 4, "heads": 6, "grid": 16, "registers": 36},
    {"width": 768, "depth": 2, "heads": 12, "grid": 16, "registers": 36},
)
"""Arithmetic grows with the square of the width, messages and norms only with the width."""

IMAGES, MICROBATCH = 4, 2


class Layout(NamedTuple):
    """Ranks of one replica."""

    name: str
    parallel: dict[str, Any]
    with_messages: bool = True

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.parallel.get("tp", 1) * self.parallel.get("pp", 1)


ALONE = Layout("one process", {})
TWIN = Layout("one process again", {})
SPLIT = (
    Layout("tp2", {"tp": 2}),
    Layout("tp2 without messages", {"tp": 2}, with_messages=False),
    Layout("tp2 + sp", {"tp": 2, "sp": True}),
    Layout("tp2 + sp without messages", {"tp": 2, "sp": True}, with_messages=False),
    Layout("pp2", {"pp": 2}),
)
CONTROL = "two side by side"


def run(settings: Settings) -> Report:
    """Steps on every layout in turn, for every width after the other."""
    rows: list[Row] = []
    samples: Samples = {}
    split = SPLIT[2:] if settings.tiny else SPLIT
    for sizes in (TINY,) if settings.tiny else SIZES:
        prefix = f"width {sizes['width']}: "
        measured = _samples(sizes, split, settings)
        samples |= {prefix + name: values for name, values in measured.items()}
        rows += compare(samples, list(_comparisons(prefix, split)))
    facts: dict[str, object] = {
        "sizes": SIZES,
        "global_images": IMAGES,
        "microbatch_images": MICROBATCH,
    }
    return Report(rows, samples, facts)


def _comparisons(prefix: str, split: Sequence[Layout]) -> Iterator[Comparison]:
    reference = prefix + ALONE.name
    twins = prefix + TWIN.name, reference
    yield Comparison(prefix + CONTROL, "cpu_s", prefix + CONTROL, reference, twins)
    for layout in split:
        name = prefix + layout.name
        aim = AIM if layout.with_messages else None
        yield Comparison(name, "cpu_s", name, reference, twins, aim)
    for layout in split:
        name = prefix + layout.name
        if layout.with_messages:
            yield Comparison(name, "wall_s", name, reference, twins)


def _samples(sizes: dict[str, int], split: Sequence[Layout], settings: Settings) -> Samples:
    groups: dict[str, RankGroup] = {}
    try:
        for layout in (ALONE, TWIN, *split):
            groups[layout.name] = RankGroup(build, layout.ranks, sizes, layout)
        variants: dict[str, Variant] = {name: group.step for name, group in groups.items()}
        variants[CONTROL] = lambda: _side_by_side(groups[ALONE.name], groups[TWIN.name])
        return interleave(variants, settings.rounds, warmup=0 if settings.tiny else 1)
    finally:
        for group in groups.values():
            group.close()


def build(sizes: dict[str, int], layout: Layout) -> Step:
    """A rank's step."""
    shape = workload.class_shape(**sizes)
    training = workload.training_config(
        images=IMAGES, microbatch=MICROBATCH, device="cpu", precision="fp32"
    )
    parallel = ParallelConfig.model_validate(layout.parallel)
    engine, _ = workload.start_engine(shape, training, parallel)
    if not layout.with_messages:
        leave_out_messages()
    batches = workload.make_batches(shape, training, torch.device("cpu"))
    steps = workload.EngineSteps(engine, batches)

    def step() -> None:
        steps.gradients()
        steps.update()

    return step


def _side_by_side(first: RankGroup, second: RankGroup) -> Sample:
    first.begin()
    second.begin()
    samples = first.finish(), second.finish()
    return {key: (samples[0][key] + samples[1][key]) / 2 for key in samples[0]}


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


def leave_out_messages() -> None:
    """Lets this process's tensor-parallel collectives send nothing; results are of the right shape,
    and finite."""
    from megatron.core.tensor_parallel import layers, mappings

    def all_reduce(tensor: Tensor, *arguments: Any, **settings: Any) -> _Done:
        return _Done()

    def all_gather(output: Tensor, tensor: Tensor, *arguments: Any, **settings: Any) -> _Done:
        output.view(-1, *tensor.shape).copy_(tensor)
        return _Done()

    def reduce_scatter(output: Tensor, tensor: Tensor, *arguments: Any, **settings: Any) -> _Done:
        output.copy_(tensor[: len(output)])
        return _Done()

    torch.distributed.all_reduce = all_reduce
    stand_ins = {"dist_all_gather_func": all_gather, "dist_reduce_scatter_func": reduce_scatter}
    for module in (layers, mappings):
        for name, stand_in in stand_ins.items():
            setattr(module, name, stand_in)
