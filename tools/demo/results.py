"""The page of results: `results.md` beside this file, filled with the numbers of a run.

What the numbers say is put into sentences by rules, so that another run cannot keep the words of an
earlier one: a difference is called one only if a 95 % interval of Student's t over seeds excludes 0.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from dsr_scale.base import atomic_files
from tools.comparison.table import Comparison

_TEMPLATE = Path(__file__).with_name("results.md")
PAGE = "results.md"
_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Two-sided 95 % quantile of Student's t, by number of seeds."""
_MOST_BYTES = 300_000
_JUDGED = {
    "held_out_loss": "held-out loss",
    "recognition": "share of recognised samples",
    "outlier_ratio_largest": "largest outlier ratio of the diffusion transformer",
    "max_over_median_largest": "largest max/median of its token norms",
}
_SHOWN = (
    *_JUDGED,
    "outlier_ratio_mean",
    "max_over_median_mean",
    "register_over_median_largest",
    "attention_top_norm_per_token_largest",
    "train_loss",
    "recognition_chance",
)


def write_docs(results: Mapping[str, Any], out: Path, docs: Path) -> Path:
    """Fills the page from the results of a run in `out` and copies its pictures; returns its path."""
    first = results["arms"][0]
    pictures = {
        "samples": out / "samples.png",
        "comparison": out / "comparison.png",
        "held_out_loss": out / "held_out_loss.png",
        "reconstructions": out / "decoders" / first / "seed_0" / "reconstructions.png",
        "encoder": _norm_maps(out / "encoder_outliers" / "figures"),
    }
    for name, source in pictures.items():
        _copy_picture(source, docs / "images" / f"demonstration_{name}.png")
    page = docs / PAGE
    atomic_files.write_bytes(page, page_text(results).encode())
    return page


def page_text(results: Mapping[str, Any]) -> str:
    """The page. Raises KeyError for results that lack what it shows."""
    sizes, encoder, latents = results["sizes"], results["encoder"], results["latents"]
    unseen = encoder["retrieval_held_out"]
    comparison = _comparison(results)
    decoders = results["decoders"]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        environment=_environment(results),
        seeds=sizes["seeds"],
        train_emoji=results["emoji"]["train"],
        held_out_emoji=results["emoji"]["held_out"],
        encoder_parameters=f"{encoder['parameters']:,}",
        encoder_minutes=f"{encoder['minutes']:.1f}",
        steps=sizes["steps"],
        images=sizes["images"],
        decoder_steps=sizes["decoder_steps"],
        findings="\n".join(f"- {line}" for line in findings(results)),
        retrieval_chance=f"{unseen['chance_top_1']:.1%}",
        retrieval_top_1=f"{unseen['top_1']:.1%}",
        retrieval_top_5=f"{unseen['top_5']:.1%}",
        register_search=_search(results["register_search"]),
        encoder_table="\n".join(_encoder_rows(results["encoder_outliers"])),
        outlier_images=sizes["outlier_images"],
        deviation_plain=f"{latents['deviation_plain']:.3f}",
        deviation_treated=f"{latents['deviation_treated']:.3f}",
        moved=f"{latents['mean_moved_in_deviations']:.3f}",
        psnr_mean=f"{next(iter(decoders.values()))['psnr_db_of_mean_image']:.2f}",
        seed_heads=" | ".join(f"seed {seed}" for seed in range(sizes["seeds"])),
        seed_rules="---|" * sizes["seeds"],
        decoder_table="\n".join(_decoder_rows(results)),
        comparison_table=comparison.markdown(_SHOWN).strip(),
        seed_table=_seed_table(comparison),
        known_prompts=sizes["prompts"],
        unseen_prompts=sizes["prompts"] // 2,
        parameters=f"{comparison.estimates['parameters'][comparison.variants[0]].mean:,.0f}",
        minutes_table=_minutes(results["minutes"]),
    )


def findings(results: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each thing that was asked."""
    untreated, treated = results["encoder_outliers"]
    largest = untreated["summary"]["outlier_ratio_largest"]
    after = treated["summary"]["outlier_ratio_largest"]
    if largest == 0:
        yield (
            "The encoder has no outlier tokens in any block, so that test-time registers have nothing to "
            "remove; here they show only what they cost an encoder that does not need them."
        )
    else:
        yield (
            f"The encoder's largest outlier ratio over blocks is {largest:.2%} untreated and "
            f"{after:.2%} with test-time registers."
        )
    if results["register_search"]["forced_on"] is not None:
        yield "The search called the encoder clean; its registers were forced."
    comparison = _comparison(results)
    for metric, name in _JUDGED.items():
        if metric in comparison.estimates:
            yield from _judged(comparison, metric, name)
    for run, why in results["failures"].items():
        yield f"{run} failed and is missing from the numbers: {why}"


def _judged(comparison: Comparison, metric: str, name: str) -> Iterator[str]:
    first = comparison.variants[0]
    for variant in comparison.variants[1:]:
        difference = comparison.difference(metric, variant)
        if difference is None:
            continue
        values = ", ".join(f"{value:+.4g}" for value in difference.values.values())
        told = f"{name[0].upper()}{name[1:]}, {variant} − {first}: {values} by seed"
        if difference.standard_error is None:
            yield f"{told}; one seed tells nothing."
        elif not any(difference.values.values()):
            yield f"{told}: no difference at all."
        elif abs(difference.mean) > _T_95[difference.n] * difference.standard_error:
            yield f"{told}; a 95 % interval excludes 0."
        else:
            yield f"{told}; this cannot be told from no difference."


def _comparison(results: Mapping[str, Any]) -> Comparison:
    """As it was, from the numbers of each seed."""
    saved = results["comparison"]
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for metric, by_variant in saved["metrics"].items():
        for variant, estimate in by_variant.items():
            for seed, value in estimate["by_seed"].items():
                record = records.setdefault(
                    (variant, seed), {"variant": variant, "seed": int(seed), "metrics": {}}
                )
                record["metrics"][metric] = value
    return Comparison.of(records.values(), saved["variants"])


def _environment(results: Mapping[str, Any]) -> str:
    machine, versions = results["environment"], results["environment"]["versions"]
    total = sum(results["minutes"].values())
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Measured on {machine['cores']} cores of {machine['cpu']} in {total:.1f} minutes, "
        f"Python {machine['python']}, {named}."
    )


def _search(search: Mapping[str, Any]) -> str:
    count = sum(len(units) for units in search["file"]["neurons"].values())
    blocks = ", ".join(search["file"]["neurons"])
    if search["forced_on"] is not None:
        return (
            "`dsr-scale registers` found the encoder clean and wrote nothing. To have a treated encoder all "
            f"the same, one pass was forced (`--max-ratio 0`) on {search['forced_on']}: {count} neurons, in "
            f"blocks {blocks}."
        )
    return f"`dsr-scale registers` found {count} register neurons, in blocks {blocks}."


def _encoder_rows(found: list[dict[str, Any]]) -> Iterator[str]:
    untreated, treated = found
    blocks = len(untreated["outlier_ratio_by_block"]) - 1
    for block in range(blocks):
        cells = [
            f"{side['outlier_ratio_by_block'][block]:.2%}" for side in (untreated, treated)
        ] + [f"{side['max_over_median_by_block'][block]:.2f}" for side in (untreated, treated)]
        yield f"| {block} | " + " | ".join(cells) + " |"


def _decoder_rows(results: Mapping[str, Any]) -> Iterator[str]:
    for arm in results["arms"]:
        cells = [
            f"{results['decoders'][f'{arm}-{seed}']['psnr_db']:.2f}"
            for seed in range(results["sizes"]["seeds"])
        ]
        yield f"| {arm} | " + " | ".join(cells) + " |"


def _seed_table(comparison: Comparison) -> str:
    columns = [
        (variant, seed)
        for variant in comparison.variants
        for seed in sorted(
            {s for by in comparison.estimates.values() if variant in by for s in by[variant].values}
        )
    ]
    lines = [
        "| metric | " + " | ".join(f"{variant}, seed {seed}" for variant, seed in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    buckets = [name for name in comparison.estimates if name.startswith("held_out_loss_t")]
    for metric in (*_SHOWN, *buckets):
        found = comparison.estimates.get(metric, {})
        if found:
            values = [
                found[variant].values.get(seed) if variant in found else None
                for variant, seed in columns
            ]
            cells = ["–" if value is None else f"{value:.4g}" for value in values]
            lines.append(f"| `{metric}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _minutes(minutes: Mapping[str, float]) -> str:
    rows = [f"| {name} | {value:.1f} |" for name, value in minutes.items()]
    return "\n".join(["| stage | minutes |", "|---|---|", *rows])


def _norm_maps(figures: Path) -> Path:
    """The linear norm maps of an encoder, which has no timesteps."""
    return next(iter(sorted(figures.glob("norm_maps*.png"))))


def _copy_picture(source: Path, target: Path) -> None:
    """Copies a picture, scaled down by halves until it is small enough for a repository."""
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    while target.stat().st_size > _MOST_BYTES:
        with Image.open(target) as opened:
            picture = opened.convert("RGB")
        picture = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)))
        content = io.BytesIO()
        picture.save(content, format="png", optimize=True)
        atomic_files.write_bytes(target, content.getvalue())
