"""Baseline against dual-stage registers on real pairs, from nothing, on one machine.

    python tools/demonstration.py --out runs/demonstration            # half an hour on 2 CPU cores
    python tools/demonstration.py --out runs/short --short            # every stage once, tiny

Emoji are divided into training and held-out families; a small vision transformer is trained on them,
since none can be downloaded; its register neurons are sought; a decoder is trained for its latents with
and without test-time registers; then diffusion transformers, without registers on plain latents and with
diffusion registers on treated ones. All are measured alike, whatever comes out: a transformer of a
million parameters may well have no outliers to remove. `--write-docs` puts the numbers into docs/results.md.

Every command is shown before it runs. Stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from tools.comparison import commands
from tools.demo.sizes import FULL, SHORT, Sizes
from tools.demo.stages import Stages

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "demonstration"
RESULTS_FILE = "results.json"
ARMS = ("baseline", "dsr")
"""Without any registers; with them in the encoder and in the diffusion transformer."""


class Demonstration:
    """All stages in one directory."""

    def __init__(
        self, out: Path, sizes: Sizes, trainer: commands.Trainer = commands.in_a_process
    ) -> None:
        atomic_files.require_writable_directory(out)
        self.out = out
        self.sizes = sizes
        self.trainer = trainer
        self.stages = Stages(out, dataclasses.asdict(sizes))
        self.train_shards, self.held_out = (
            str(out / "emoji" / part) for part in ("train", "held_out")
        )
        self.registers = out / "registers.json"

    def run(self) -> dict[str, Any]:
        """Every stage in order; writes and returns the results."""
        stages = self.stages
        results: dict[str, Any] = {"sizes": dataclasses.asdict(self.sizes), "arms": list(ARMS)}
        results["emoji"] = stages.run("emoji", self.split)
        self.write_run_files()
        results["encoder"] = stages.run("encoder", self.train_encoder)
        results["register_search"] = stages.run("register neurons", self.find_registers)
        results["latents"] = stages.run("statistics of latents", self.compute_statistics)
        results["encoder_outliers"] = stages.run("outliers of the encoder", self.encoder_outliers)
        results["decoders"] = {
            f"{arm}-{seed}": stages.run(
                f"decoder of {arm}, seed {seed}", lambda a=arm, s=seed: self.train_decoder(a, s)
            )
            for seed in range(self.sizes.seeds)
            for arm in ARMS
        }
        results["failures"] = stages.run("diffusion transformers", self.compare_arms)
        comparison = json.loads((self.out / "comparison.json").read_text())
        results["comparison"] = {
            "variants": comparison["variants"],
            "metrics": comparison["metrics"],
        }
        stages.run("outliers side by side", self.side_by_side)
        results["minutes"] = stages.minutes
        results["environment"] = environment()
        atomic_files.write_json(self.out / RESULTS_FILE, results)
        return results

    def split(self) -> dict[str, int]:
        """Training and held-out packs."""
        from tools.emoji_split import split

        return split(self.out / "emoji")

    def write_run_files(self) -> None:
        """Run files with the paths of this directory, to be used by hand as well."""
        treatment = {"kind": "registers", "neurons": str(self.registers)}
        for arm in ARMS:
            image: dict[str, Any] = {
                "model": str(self.out / "encoder"),
                "statistics": str(self.out / f"{arm}.safetensors"),
            }
            if arm == "dsr":
                image["outliers"] = treatment
            data: dict[str, Any] = {"shards": self.train_shards, "max_samples": self.sizes.images}
            steps = self.sizes.steps
            training = {"steps": steps, "schedule": {"warmup_steps": min(20, steps // 4)}}
            self.write_run_file(
                arm,
                arm,
                data=data,
                encoders={"image": image, "decoder": {"model": str(self.decoder(arm, 0))}},
                training=training,
                grid={"sampling": {"steps": self.sizes.sampling_steps}},
            )
            # The decoder, like the statistics, is of all training emoji.
            data = {"shards": self.train_shards, "max_samples": self.sizes.encoder_images}
            steps = self.sizes.decoder_steps
            training = {"steps": steps, "schedule": {"warmup_steps": min(20, steps // 4)}}
            self.write_run_file(
                f"decoder_{arm}", "decoder", data=data, encoders={"image": image}, training=training
            )

    def write_run_file(self, name: str, parent: str, **settings: Any) -> None:
        """`out`/`name`.yaml, which extends a file of configs/demonstration/."""
        from dsr_scale.config.yaml_text import to_yaml

        content = {"extends": str(CONFIGS / f"{parent}.yaml"), "name": name, **settings}
        atomic_files.write_bytes(self.run_file(name), to_yaml(content).encode())

    def run_file(self, name: str) -> Path:
        """Path of a run file of this directory."""
        return self.out / f"{name}.yaml"

    def decoder(self, arm: str, seed: int) -> Path:
        """Directory of a trained decoder."""
        return self.out / "decoders" / arm / f"seed_{seed}" / "decoder"

    def train_encoder(self) -> dict[str, Any]:
        """The vision transformer, on all training emoji."""
        from dsr_scale.config.load import load_run
        from tools.train_toy_encoder import make_encoder

        run = load_run(self.run_file("baseline"))
        data = run.data.model_copy(update={"max_samples": self.sizes.encoder_images})
        return make_encoder(
            run.model_copy(update={"data": data}),
            self.sizes.encoder,
            self.out / "encoder",
            held_out=self.held_out,
            console=commands.console,
        )

    def find_registers(self) -> dict[str, Any]:
        """Register neurons as `dsr-scale registers` finds them, forced if it calls the encoder clean.

        A forced search shows what test-time registers cost an encoder that does not need them. It is
        forced on the patches of largest norms, or on all where no norm is far from the others.
        """
        words = ["registers", self.run_file("baseline"), "data.max_samples=null"]
        words += ["--out", self.registers, "--count", self.sizes.register_images]
        commands.here(*words)
        forced_on = None
        if not self.registers.is_file():
            words += ["--max-ratio", 0, "--passes", 1, "--top-k", self.sizes.forced_neurons]
            # Without outliers no block is the first that has them.
            words += ["--highest-layer", self.sizes.encoder.depth - 2]
            forced_on = "patches over mean + 3 standard deviations"
            try:
                commands.here(*words)
            except InputError:
                forced_on = "all patches"
                commands.here(*words, "--threshold", 0)
        return {"forced_on": forced_on, "file": json.loads(self.registers.read_text())}

    def compute_statistics(self) -> dict[str, float]:
        """Latent statistics of both arms, and how far apart they are."""
        from safetensors.torch import load_file

        for arm in ARMS:
            count = self.sizes.encoder_images
            options = [] if count is None else ["--count", count]
            commands.here("stats", self.run_file(arm), "data.max_samples=null", *options)
        plain, treated = (load_file(self.out / f"{arm}.safetensors") for arm in ARMS)
        deviation = plain["variance"].sqrt()
        return {
            "deviation_plain": deviation.mean().item(),
            "deviation_treated": treated["variance"].sqrt().mean().item(),
            "mean_moved_in_deviations": ((treated["mean"] - plain["mean"]).abs() / deviation)
            .mean()
            .item(),
        }

    def encoder_outliers(self) -> list[dict[str, Any]]:
        """The encoder untreated and treated, side by side, on held-out emoji."""
        from dsr_scale.evaluate.outlier_findings import load_findings
        from tools.comparison.measures import outlier_summary

        out = self.out / "encoder_outliers"
        count = ["--images", self.sizes.outlier_images]
        commands.here(
            "outliers", self.run_file("dsr"), "--data", self.held_out, *count, "--out", out
        )
        return [
            {
                "treatment": found.settings["outlier_treatment"],
                "summary": outlier_summary(found.measures),
                "outlier_ratio_by_block": found.measures["outlier_ratio"][:, 0].tolist(),
                "max_over_median_by_block": found.measures["max_over_median"][:, 0].tolist(),
            }
            for found in load_findings(out)
        ]

    def train_decoder(self, arm: str, seed: int) -> dict[str, float]:
        """Trains and exports a decoder, and reconstructs held-out emoji."""
        from dsr_scale.config.load import load_run
        from tools.demo.reconstruction import reconstruction

        place = self.decoder(arm, seed).parent
        where = (f"directory={place / 'run'}", f"seed={seed}")
        log = place / "train.log"
        status = self.trainer(("train", str(self.run_file(f"decoder_{arm}")), *where), log)
        if status:
            raise InputError(
                found=f"training the decoder ended with status {status}",
                required="a decoder for every kind of latents",
                remedy=f"see {log}",
            )
        commands.here("export", place / "run", self.decoder(arm, seed))
        run = load_run(self.run_file(arm), [f"encoders.decoder.model={self.decoder(arm, seed)}"])
        picture = place / "reconstructions.png"
        count = self.sizes.held_out_samples
        return reconstruction(run.encoders, self.held_out, run.data.resolution, picture, count)

    def compare_arms(self) -> dict[str, str]:
        """Trains and measures both arms' diffusion transformers; returns what failed."""
        from tools.comparison.compare import compare
        from tools.comparison.measures import Questions
        from tools.comparison.runs import plan_runs

        runs = plan_runs(
            [self.run_file(arm) for arm in ARMS],
            self.sizes.seeds,
            self.out,
            by_seed=lambda arm, seed: [f"encoders.decoder.model={self.decoder(arm, seed)}"],
        )
        questions = Questions(
            prompts=self.prompts(),
            recognition_prompts=self.sizes.recognition_prompts,
            held_out=self.held_out,
            held_out_samples=self.sizes.held_out_samples,
            outlier_images=self.sizes.outlier_images,
            timesteps=self.sizes.timesteps,
            outlier_data=self.held_out,
        )
        title = "Baseline and dual-stage registers on emoji"
        return compare(runs, questions, self.out, title=title, trainer=self.trainer)

    def prompts(self) -> tuple[str, ...]:
        """Captions at the front of the training pack, then held-out ones."""
        from dsr_scale.evaluate.reference_set import data_at
        from dsr_scale.evaluate.training_images import training_images

        known, unseen = (
            training_images(data_at(shards, 64), count)[1]
            for shards, count in (
                (self.train_shards, self.sizes.prompts),
                (self.held_out, self.sizes.prompts // 2),
            )
        )
        return (*known, *unseen)

    def side_by_side(self) -> list[str]:
        """One outlier report of both arms for each seed; returns their places."""
        from dsr_scale.evaluate.outlier_findings import load_findings, save_findings
        from dsr_scale.evaluate.outlier_report import write_report

        pages = []
        for seed in range(self.sizes.seeds):
            places = [self.out / arm / f"seed_{seed}" / "outliers" for arm in ARMS]
            found = [one for place in places if place.is_dir() for one in load_findings(place)]
            if len(found) == len(ARMS):
                out = self.out / "outliers" / f"seed_{seed}"
                atomic_files.require_writable_directory(out)
                save_findings(found, out)
                pages.append(str(write_report(found, out)))
        return pages


def environment() -> dict[str, Any]:
    """What times and numbers depend on."""
    from dsr_scale.evaluate.report import library_versions
    from tools.bench.report import environment as machine

    known = machine()
    kept = {name: known[name] for name in ("cpu", "cores", "gpu", "python")}
    return {**kept, "versions": library_versions()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line; mistakes end with status 2, a failed run with 1."""
    from dsr_scale.cli.main import show_input_error

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--short", action="store_true", help="every stage once, tiny")
    parser.add_argument(
        "--training",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="times as many training steps; below 1 for slower machines",
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="docs/results.md and its pictures"
    )
    options = parser.parse_args(arguments)
    declare_torchvision_operators()
    try:
        sizes = (SHORT if options.short else FULL).with_training(options.training)
        results = Demonstration(options.out, sizes).run()
        if options.write_docs:
            from tools.demo.results import write_docs

            write_docs(results, options.out, ROOT / "docs")
    except InputError as error:
        show_input_error(error)
        sys.exit(2)
    commands.console.print(f"→ {options.out / RESULTS_FILE}, {options.out / 'report.html'}")
    sys.exit(1 if results["failures"] else 0)


if __name__ == "__main__":
    main()
