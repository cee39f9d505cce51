"""README.md of a bundle: a model card written from what is known, and gaps that only the owner can fill.

Nothing is claimed that was not recorded: a measure stands with the step at which it was logged, and a
section without data is left out. Licences are facts about rights that no file of a run holds, so they
are written as gaps that cannot be overlooked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from dsr_scale.config.encoders import EncodersConfig, VitImage
from dsr_scale.export.history import RunHistory

if TYPE_CHECKING:
    from dsr_scale.export.bundle import BundleDescription

CARD_FILE = "README.md"
GRID_FILE = "sample_grid.png"
TO_FILL = "TO BE FILLED IN BY THE OWNER"

_NOT_SHOWN = ("time/", "images_per_s", "tflops", "mfu_", "memory_gib", "step_s", "slowest_")
"""Beginnings of metrics that are about the job and not about the model."""

_RECIPE = (
    "seed",
    "data.resolution",
    "data.condition_dropout",
    "diffusion.timesteps.distribution",
    "diffusion.weighting",
    "training.steps",
    "training.global_batch_images",
    "training.precision",
    "training.optimizer.learning_rate",
    "training.optimizer.betas",
    "training.optimizer.weight_decay",
    "training.optimizer.gradient_clip",
    "training.schedule.warmup_steps",
    "training.schedule.decay",
    "training.ema_decays",
)
"""Settings of the run file; what the bundle describes itself is added from there."""


def model_card(description: BundleDescription, history: RunHistory | None) -> str:
    """The card in Markdown, with front matter that the Hugging Face hub reads."""
    sections = [
        _front_matter(description),
        f"# {description.provenance.run_name}\n\n{_summary(description)}",
        "## Use\n\n" + _use(description),
        "## Recipe\n\n" + _table(("setting", "value"), _recipe(description, history)),
    ]
    if history is not None:
        sections += _measured(history)
    sections += [
        "## Frozen encoders\n\n" + _table(("part", "what", "where"), _encoders(description)),
        "## Licences\n\n" + _licences(),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(description: BundleDescription) -> str:
    content: dict[str, Any] = {
        "license": "other",
        "license_name": TO_FILL.lower().replace(" ", "-"),
        "library_name": "dsr-scale",
        "tags": ["diffusion", "flow-matching", "dual-stage-registers"],
    }
    if description.shape.text_kind != "none":
        content["pipeline_tag"] = "text-to-image"
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _summary(description: BundleDescription) -> str:
    origin, shape = description.provenance, description.shape
    asked = "a class number" if shape.text_kind == "none" else "a caption"
    rows = (
        ("made by", description.written_by),
        ("run", origin.run_name),
        ("optimizer steps", origin.step),
        ("images seen", origin.samples_seen),
        ("weights", "raw" if origin.weights == "raw" else f"average {origin.weights}"),
        ("precision", description.precision),
        ("data fingerprint", f"`{origin.data_fingerprint}`"),
        ("digest of the weights", f"`{description.weights_digest}`"),
    )
    return (
        f"A diffusion transformer that draws images of {description.resolution} × "
        f"{description.resolution} pixels from {asked}, with {shape.registers} diffusion registers.\n\n"
        + _table(("", ""), rows)
    )


def _use(description: BundleDescription) -> str:
    prompt = "0" if description.shape.text_kind == "none" else "a red apple"
    return (
        "Needs `pip install dsr-scale`. With this directory as `BUNDLE`:\n\n"
        "```\n"
        f'dsr-scale sample BUNDLE --prompt "{prompt}" --out samples.png\n'
        "```\n\n"
        "```python\n"
        "from dsr_scale.export import load\n\n"
        f'images = load("BUNDLE").sample(["{prompt}"], seed=0)  # uint8 [N,3,H,W]\n'
        "```\n\n"
        "```python\n"
        "from dsr_scale.export import DSRPipeline  # a diffusers pipeline\n\n"
        f'image = DSRPipeline.from_pretrained("BUNDLE")("{prompt}", seed=0).images[0]\n'
        "```"
    )


def _recipe(
    description: BundleDescription, history: RunHistory | None
) -> Iterator[tuple[str, object]]:
    shape = description.shape
    yield "body: width, blocks, heads", f"{shape.width}, {shape.depth}, {shape.heads}"
    if shape.head is not None:
        head = shape.head
        yield "head: width, blocks, heads", f"{head.width}, {head.depth}, {head.heads}"
    yield "patch; latents", f"{shape.patch}; {shape.channels} × {shape.grid[0]} × {shape.grid[1]}"
    yield "registers; first block with them", f"{shape.registers}; {shape.register_start}"
    if shape.registers_masked:
        yield "registers", "masked from all other tokens"
    if shape.attention_variant != "plain":
        yield "attention", shape.attention_variant
    yield "conditioning", shape.conditioning.kind
    yield (
        "prediction; timestep shift α",
        (f"{description.diffusion.prediction}; {description.timestep_shift:.6g}"),
    )
    for name in _RECIPE if history is not None else ():
        value: Any = history.config if history is not None else {}
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        yield f"`{name}`", value


def _measured(history: RunHistory) -> Iterator[str]:
    """Sections on what the run logged."""
    shown = {
        name: measured
        for name, measured in history.metrics.items()
        if not name.startswith(_NOT_SHOWN)
    }
    if shown:
        rows = [(f"`{name}`", f"{m.value:.6g}", m.step) for name, m in sorted(shown.items())]
        yield "## Metrics\n\n" + (
            "As logged while training, each with the step of its last value; `docs/metrics.md` of "
            "dsr-scale says what they mean.\n\n" + _table(("metric", "value", "step"), rows)
        )
    if history.token_norms:
        names = sorted({name for block in history.token_norms.values() for name in block})
        rows = [
            (block, *(f"{values[name]:.4g}" if name in values else "" for name in names))
            for block, values in history.token_norms.items()
        ]
        yield "## Outlier tokens\n\n" + (
            "Measured last in training, the largest over timesteps.\n\n"
            + _table(("block", *(f"`{name}`" for name in names)), rows)
        )
    if history.grid is not None:
        yield (
            "## Samples\n\n"
            f"Drawn by the run from its average ({history.grid.stem.replace('_', ' ')}).\n\n"
            f"![samples]({GRID_FILE})"
        )


def _encoders(description: BundleDescription) -> Iterator[tuple[str, str, str]]:
    encoders: EncodersConfig = description.encoders
    for part, config in (
        ("text encoder", encoders.text),
        ("image encoder", encoders.image),
        ("decoder", encoders.decoder),
    ):
        model, revision = getattr(config, "model", None), getattr(config, "revision", None)
        if model is None:
            yield part, config.kind, "part of dsr-scale"
        elif model in description.copied_models:
            yield part, f"{config.kind}, {description.copied_models[model]}", f"`{model}/`"
        else:
            name = config.known_as if isinstance(config, VitImage) else model
            yield (
                part,
                f"{config.kind}, {name}" + (f" @ {revision}" if revision else ""),
                ("not in this bundle: from the hub, or a path of the machine that exported"),
            )


def _licences() -> str:
    rows = [
        (what, f"**{TO_FILL}**")
        for what in ("these weights", "training images", "training captions")
    ]
    rows.append(("frozen encoders", f"**{TO_FILL}** (each keeps the licence of its publisher)"))
    return (
        "dsr-scale cannot know them. Replace `license` and `license_name` at the top of this file, "
        "and:\n\n" + _table(("of", "licence"), rows)
    )


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
