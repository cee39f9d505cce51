"""The forwards that measure a target: every image at every timestep, reduced as it passes.

Every timestep sees the same images with the same noise, so that the columns of a report differ by time
alone. Hooks and the network's own probe hand tokens and attention to a `Collector`; the network
runs as it always does. An encoder is measured as it is and, where a treatment is configured, with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.diffusion.path import add_noise
from dsr_scale.diffusion.timesteps import draw_noise, shift_timesteps
from dsr_scale.encoders.outliers import Treatment, treated
from dsr_scale.encoders.patch_norms import removed
from dsr_scale.evaluate.attention_mass import observed_dit, observed_vit
from dsr_scale.evaluate.outlier_collector import Collector
from dsr_scale.evaluate.outlier_findings import OUTPUT, Findings, Timestep
from dsr_scale.evaluate.outlier_statistics import NO_ROWS, TokenRows
from dsr_scale.evaluate.outlier_targets import DiffusionTarget, EncoderTarget, Measurement, Target
from dsr_scale.model.layout import Rows

OnImages = Callable[[int], None]
"""Told how many images have just passed."""


def timesteps_on_axes(
    values: Sequence[float], axis: Literal["model", "preshift"], alpha: float
) -> tuple[Timestep, ...]:
    """Times of one axis on both, where `alpha` shifts timesteps towards noise."""
    times = torch.tensor(values, dtype=torch.float64)
    # Shifting by 1/α undoes shifting by α.
    model = times if axis == "model" else shift_timesteps(times, alpha)
    preshift = shift_timesteps(times, 1 / alpha) if axis == "model" else times
    return tuple(map(Timestep, model.tolist(), preshift.tolist()))


def image_forwards(target: Target, how: Measurement) -> int:
    """How many images pass in a measurement, each counted as often as it does."""
    if isinstance(target, DiffusionTarget):
        return how.images * len(how.timesteps)
    return how.images * len(_treatments(target))


@torch.inference_mode()
def measure(
    target: Target, how: Measurement, on_images: OnImages = lambda _images: None
) -> list[Findings]:
    """The findings of a target; of an encoder whose outliers are treated, without and with that."""
    if isinstance(target, DiffusionTarget):
        return [_measure_diffusion(target, how, on_images)]
    return [
        _measure_encoder(target, how, name, treatment, on_images)
        for name, treatment in _treatments(target).items()
    ]


def _treatments(target: EncoderTarget) -> dict[str, Treatment | None]:
    configured = target.encoder.treatment
    treatments: dict[str, Treatment | None] = {"untreated": None}
    if configured is not None:
        treatments[target.encoder.config.outliers.kind] = configured
    return treatments


def _measure_diffusion(target: DiffusionTarget, how: Measurement, on_images: OnImages) -> Findings:
    model, images, patch = target.model, target.images, target.model.shape.patch
    timesteps = timesteps_on_axes(how.timesteps, how.axis, target.timestep_shift)
    batches = how.batches()
    latents = [target.latents(part, how.device).cpu() for part in batches]
    conditions = [target.condition(part, how.device) for part in batches]
    channels, height, width = latents[0].shape[1:]
    names = [model.block_name(index) for index in range(model.total_blocks)]
    collector = Collector(
        [*names, OUTPUT],
        len(timesteps),
        (height // patch, width // patch),
        images=how.images,
        registers=model.shape.registers,
        threshold=how.threshold,
    )
    for step, timestep in enumerate(timesteps):
        for part, stored, condition in zip(batches, latents, conditions, strict=True):
            x = stored.to(how.device)
            ids = images.sample_ids[part]
            noise = draw_noise(
                (channels, height, width),
                how.seed,
                [0] * len(ids),
                ids,
                how.device,
                purpose="outliers",
            )
            t = torch.full((len(x),), timestep.model, device=how.device)
            layout = model.layout(height, width, condition)
            rows = {name: _token_rows(layout.at(name)) for name in names}
            rows[OUTPUT] = _image_alone(layout.image)
            collector.begin(step, part.start, rows, _patches(x, patch))
            with (
                observed_dit(model, collector.attention, collector.cross_attention),
                _told_output(OUTPUT, model.final_layer, collector),
            ):
                model(add_noise(x, noise, t), t, condition, probe=collector.tokens)
            on_images(len(x))
        collector.end_timestep()
    return collector.findings(
        target.name,
        "diffusion",
        timesteps,
        pictures=images.pixels,
        captions=images.prompts,
        settings={
            **target.settings,
            **images.origin,
            "seed": how.seed,
            "norm_threshold": how.threshold,
            "timestep_shift": target.timestep_shift,
        },
    )


def _measure_encoder(
    target: EncoderTarget,
    how: Measurement,
    name: str,
    treatment: Treatment | None,
    on_images: OnImages,
) -> Findings:
    encoder, images = target.encoder, target.images
    # Statistics are of the configured treatment: they whiten no other latents.
    whitening = encoder.whitening if treatment is encoder.treatment else None
    patch = encoder.geometry.patch
    side = encoder.geometry.input_size // patch
    with treated(encoder, treatment):
        first_patch, has_cls = encoder.dropped_tokens, int(encoder.family.has_cls)
        inside = TokenRows(
            registers=slice(has_cls, first_patch),
            image=slice(first_patch, first_patch + side * side),
            text=NO_ROWS,
            special=slice(0, has_cls),
        )
        names = [f"blocks.{index}" for index in range(len(encoder.structure.blocks))]
        collector = Collector(
            [*names, OUTPUT],
            1,
            (side, side),
            images=how.images,
            registers=first_patch - has_cls,
            threshold=how.threshold,
        )
        rows = dict.fromkeys(names, inside) | {OUTPUT: _image_alone(side * side)}
        for part in how.batches():
            batch = images.pixels[part]
            pixels = encoder.preprocess(batch, (side * patch, side * patch))
            collector.begin(0, part.start, rows, _patches(pixels, patch))
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(observed_vit(encoder, collector.attention))
                for block_name, block in zip(names, encoder.structure.blocks, strict=True):
                    hooks.enter_context(_told_output(block_name, block, collector))
                final = encoder.tokens(batch)[:, inside.image].float()
            if whitening is not None:
                final = whitening.apply(final.mT.unflatten(-1, (side, side))).flatten(2).mT
            collector.tokens(OUTPUT, final)
            on_images(len(batch))
    collector.end_timestep()
    return collector.findings(
        f"{target.name}, {name}",
        "encoder",
        (),
        pictures=images.pixels,
        captions=(),
        settings={
            **target.settings,
            **images.origin,
            "seed": how.seed,
            "norm_threshold": how.threshold,
            "outlier_treatment": name,
            "whitened_output": whitening is not None,
        },
    )


def _patches(field: Tensor, patch: int) -> Tensor:
    """What each patch of a field [B,C,H,W] holds: [B,T,C·p²]."""
    return functional.unfold(field, patch, stride=patch).mT


def _token_rows(rows: Rows) -> TokenRows:
    text = slice(rows.registers, rows.registers + rows.text)
    return TokenRows(rows.register_slice, rows.image_slice, text, NO_ROWS)


def _image_alone(tokens: int) -> TokenRows:
    return TokenRows(NO_ROWS, slice(0, tokens), NO_ROWS, NO_ROWS)


def _told_output(
    name: str, module: nn.Module, collector: Collector
) -> contextlib.AbstractContextManager[None]:
    """Inside, the collector is told what `module` puts out."""

    def tell(_module: nn.Module, _inputs: Any, output: Any) -> None:
        collector.tokens(name, output[0] if isinstance(output, tuple) else output)

    return removed([module.register_forward_hook(tell)])
