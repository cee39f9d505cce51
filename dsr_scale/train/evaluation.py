"""Measures of the averaged weights while training: those of `dsr-scale evaluate` for the exported bundle.

All ranks take part, however the model is split in training: each holds the whole network for that time,
draws its share of the images, and waits for the others once, when all is counted. The price is the
network in fp32 on every device beside the state of training; what is loaded goes again afterwards.

A signal to any rank, or a failure, ends the evaluation within a batch on all (`train.agreement`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsr_scale.base.errors import InputError
from dsr_scale.data.shares import Share
from dsr_scale.encoders.contract import TextEncoder, build_image_encoder
from dsr_scale.evaluate import sample_sets
from dsr_scale.evaluate.counting import (
    Begin,
    JudgeWeights,
    Work,
    count_held_out,
    count_images,
    count_reference,
    held_out_values,
    load_scorers,
)
from dsr_scale.evaluate.heldout_loss import HeldOutSet, HeldOutSums
from dsr_scale.evaluate.metrics import (
    OF_IMAGES,
    OF_REFERENCE,
    ImageSums,
    Metric,
    RealImages,
    Scorers,
    obstacle,
    real_images,
    values_of,
)
from dsr_scale.evaluate.reference_set import Reference, data_at, open_reference
from dsr_scale.evaluate.report import Report
from dsr_scale.evaluate.sample_sets import SampleSet
from dsr_scale.export.pipeline import Pipeline, build_pipeline
from dsr_scale.telemetry.metrics import METRICS_FILE, MetricsLog, read_metrics
from dsr_scale.train.agreement import Agreement, Stopped, together
from dsr_scale.train.build import Training, empty_network
from dsr_scale.train.grids import gather_average

PREFIX = "evaluation/"
"""Of the names in metrics.jsonl and in the tracker."""


@dataclass(frozen=True)
class _Inputs:
    """What is evaluated, opened on this rank; None where no metric asks for it."""

    samples: SampleSet | None
    reference: Reference | None
    """This rank's share."""
    held_out: HeldOutSet | None


class _Counted(NamedTuple):
    """What this rank has seen; None where there was nothing to see."""

    images: ImageSums | None
    reference: ImageSums | None
    held_out: HeldOutSums | None

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [tensor for part in self if part is not None for tensor in part.tensors()]


class TrainingEvaluation:
    """Evaluates a run at intervals. All ranks call every method but `is_due` together."""

    def __init__(self, training: Training, tell: Callable[[str], None]) -> None:
        """Opens what is evaluated, and tries the weights of the judging networks.

        `tell` is told which metrics are left out for want of weights and what to fetch, and later what
        could not be measured. Raises InputError when anything else is missing, and when no metric is left.
        """
        self._training = training
        self._ranks = training.ranks
        self._config = training.run.evaluation
        self._tell = tell
        self._share = Share(training.ranks.rank, training.ranks.world_size)
        self._inputs = together(lambda: _open(training, self._share), self._ranks)
        self._metrics = self._with_weights()
        self._real: RealImages | None = None
        """On the first rank, once the reference has been seen."""
        self._reference_is_known = False

    @staticmethod
    def for_run(training: Training, tell: Callable[[str], None]) -> TrainingEvaluation | None:
        """None when the config asks for no evaluation."""
        if training.run.evaluation.every_steps is None:
            return None
        return TrainingEvaluation(training, tell)

    def is_due(self, step: int) -> bool:
        """Whether the run is evaluated after step `step`."""
        every_steps = self._config.every_steps
        assert every_steps is not None
        return step > 0 and step % every_steps == 0

    def is_owed(self, step: int) -> bool:
        """Whether a run that goes on from `step` had ended before the evaluation that was due there."""
        if not self.is_due(step):
            return False
        directory = Path(self._training.run.directory)
        return self._ranks.on_first(lambda: not _is_logged(directory, step))

    def evaluate(
        self,
        step: int,
        log: MetricsLog | None,
        *,
        asked: Callable[[], bool],
        touch: Callable[[], None],
    ) -> bool:
        """Measures the run and logs the numbers on the first rank; whether it came to the end.

        `asked` says whether this rank has been asked to stop; `touch` is called before every batch. What
        a person could put right is told: training does not depend on it. Raises all else on all ranks
        alike, as the error where it was met and as RuntimeError elsewhere.
        """
        agreement = Agreement(self._ranks, f"evaluation/{step}", asked=asked, touch=touch)
        try:
            report = self._evaluate(agreement)
        except Stopped:
            return False
        except InputError as error:
            self._tell(f"no evaluation after step {step}, training goes on: {error}")
            return True
        finally:
            # A network with a hook refers to itself, so only the collector frees it.
            gc.collect()
            if self._ranks.device.type == "cuda":
                torch.cuda.empty_cache()
        for name, reason in report.failed.items():
            self._tell(f"no {name} after step {step}, training goes on: {reason}")
        if log is not None and report.values:
            log.log(step, {f"{PREFIX}{name}": value for name, value in report.values.items()})
        return True

    def _evaluate(self, agreement: Agreement) -> Report:
        pipeline, scorers = agreement.together(self._load)
        self._spread_average(pipeline.model)

        def begin(name: str, total: int) -> Callable[[int], None]:
            agreement.look()
            return lambda images: agreement.look()

        counted = agreement.together(lambda: self._count(pipeline, scorers, begin))
        if self._ranks.world_size > 1:
            for tensor in counted.tensors():
                dist.all_reduce(tensor)
        report = self._ranks.on_first(lambda: self._numbers(counted))
        self._reference_is_known = True
        return report

    def _with_weights(self) -> frozenset[Metric]:
        """The metrics whose weights every rank has. Raises InputError for none."""
        wanted = frozenset(Metric(name) for name in self._config.metrics)
        report = Report()
        together(lambda: self._scorers(wanted, report), self._ranks)
        lacking = dict(self._ranks.gather_on_host(sorted(report.not_computed.items())))
        for reason in dict.fromkeys(lacking.values()):
            names = ", ".join(name for name in lacking if lacking[name] == reason)
            self._tell(
                f"evaluation without {names}: {reason}; in a run file these are "
                "evaluation.inception_weights and evaluation.clip"
            )
        left = wanted - lacking.keys()
        if not left:
            raise InputError(
                found="no evaluation.metrics that have their weights: "
                + "; ".join(dict.fromkeys(lacking.values())),
                required="at least one with all that it needs",
                remedy="supply what is named above, or remove evaluation.every_steps",
            )
        return left

    def _scorers(self, wanted: frozenset[Metric], report: Report) -> Scorers:
        named = self._config.inception_weights
        weights = JudgeWeights(None if named is None else Path(named), self._config.clip)
        return load_scorers(wanted, weights, self._ranks.device, report)

    def _load(self) -> tuple[Pipeline, Scorers]:
        """The network without weights and all that surrounds it, and the networks that judge."""
        training, run = self._training, self._training.run
        report = Report()
        scorers = self._scorers(self._metrics, report)
        if report.not_computed:
            raise InputError(
                found="; ".join(dict.fromkeys(report.not_computed.values())),
                required="the weights that were there when the run began",
                remedy="put them back",
            )
        pipeline = build_pipeline(
            empty_network(training.shape, self._ranks.device),
            shape=training.shape,
            diffusion=run.diffusion,
            timestep_shift=training.timestep_shift,
            encoders=run.encoders,
            resolution=run.data.resolution,
            device=self._ranks.device,
            text_encoder=self._lent_text_encoder(),
        )
        return pipeline, scorers

    def _lent_text_encoder(self) -> TextEncoder | None:
        """The one that training has loaded. Servers' would keep what they gave for every prompt."""
        encoders = self._training.feed.encoders
        if encoders is None or self._training.run.encoder.mode == "service":
            return None
        return encoders.text

    @torch.no_grad()
    def _spread_average(self, network: nn.Module) -> None:
        """Fills every rank's network with the averaged weights."""
        gather_average(self._training, network if self._ranks.is_first else None)
        if self._ranks.world_size > 1:
            for tensor in (*network.parameters(), *network.buffers()):
                dist.broadcast(tensor, src=0)

    def _count(self, pipeline: Pipeline, scorers: Scorers, begin: Begin) -> _Counted:
        config, inputs = self._config, self._inputs
        work = Work(config.batch_images, self._ranks.device, begin, self._share)
        reference = images = held_out = None
        if inputs.reference is not None and not self._reference_is_known:
            reference = count_reference(inputs.reference, self._metrics, scorers, work)
        if (of_images := OF_IMAGES & self._metrics) and inputs.samples is not None:
            images = ImageSums(of_images, len(inputs.samples), work.device)
            drawn = sample_sets.draw(
                pipeline,
                inputs.samples,
                seed=config.seed,
                sampling=config.sampling or self._training.run.grid.sampling,
                batch=work.batch,
                share=self._share,
            )
            count_images(images, scorers, drawn, begin("images", len(inputs.samples)))
        if inputs.held_out is not None:
            held_out = self._count_held_out(inputs.held_out, pipeline, work)
        return _Counted(images, reference, held_out)

    def _count_held_out(self, held_out: HeldOutSet, pipeline: Pipeline, work: Work) -> HeldOutSums:
        run, encoders = self._training.run, self._training.feed.encoders
        encoder = None if encoders is None else encoders.image
        if encoder is None:
            encoder = build_image_encoder(
                run.encoders.image, resolution=run.data.resolution, device=work.device
            )
        return count_held_out(
            held_out, pipeline, encoder, run.encoders, seed=self._config.seed, work=work
        )

    def _numbers(self, counted: _Counted) -> Report:
        """On the first rank, from the sums of all."""
        report = Report()
        if counted.images is not None:
            if self._real is None:
                self._real = self._real_images(counted.reference)
            for metric in counted.images.metrics:
                try:
                    report.values |= values_of(metric, counted.images, self._real)
                except InputError as error:
                    report.fail(metric, error)
        if counted.held_out is not None:
            try:
                report.values |= held_out_values(counted.held_out)
            except InputError as error:
                report.fail(Metric.held_out_loss, error)
        return report

    def _real_images(self, seen: ImageSums | None) -> RealImages:
        if self._inputs.reference is None:
            return RealImages()
        real = real_images(self._inputs.reference, seen)
        # Kept for the run, so not on the device.
        return replace(real, features=None if real.features is None else real.features.cpu())


def _open(training: Training, share: Share) -> _Inputs:
    """What the metrics are computed from. Raises InputError when it cannot be had, or is too little."""
    run, config, shape = training.run, training.run.evaluation, training.shape
    wanted = frozenset(Metric(name) for name in config.metrics)
    by_class = shape.conditioning.kind == "class"
    samples = reference = held_out = None
    if wanted & OF_IMAGES:
        assert config.images is not None
        if by_class:
            samples = sample_sets.class_balanced(shape, config.images)
        else:
            assert config.prompts_file is not None
            samples = sample_sets.prompts_in_turn(Path(config.prompts_file), config.images)
    if wanted & OF_REFERENCE:
        assert config.reference is not None
        reference = open_reference(config.reference, run.data.resolution, share)
    if Metric.held_out_loss in wanted:
        assert config.held_out is not None
        data = data_at(config.held_out, run.data.resolution)
        data = data.model_copy(update={"label_field": run.data.label_field})
        held_out = HeldOutSet(data, shape, config.held_out_samples)
    for metric in sorted(wanted):
        problem = obstacle(
            metric,
            images=0 if samples is None else len(samples),
            reference=reference,
            prompts=not by_class,
            held_out=held_out is not None,
        )
        if problem is not None:
            raise problem
    return _Inputs(samples, reference, held_out)


def _is_logged(directory: Path, step: int) -> bool:
    """Whether metrics.jsonl has numbers of an evaluation after `step` steps."""
    if not (directory / METRICS_FILE).is_file():
        return False
    return any(
        name.startswith(PREFIX)
        for record in read_metrics(directory)
        if record["step"] == step
        for name in record
    )
