"""Everything that a resumed run needs besides tensors, in one place and one JSON file.

Noise, timesteps, captions and order are functions of the seed and the sample, so there is no
generator state to keep: the position is one integer, the number of consumed samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

from dsr_scale.base.errors import InputError

LIBRARIES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "transformers",
    "diffusers",
    "mosaicml-streaming",
    "numpy",
)


@dataclass(frozen=True)
class RunState:
    """State after `step` finished optimizer steps."""

    step: int
    samples_seen: int
    skipped_steps: int
    """Steps that were not finite or spiked, and changed nothing."""
    skipped_in_a_row: int
    guard: tuple[float, ...]
    """Running statistics by which spikes are judged (`parallel.guard`)."""
    corrupt_seen: int
    data_fingerprint: str
    data_samples: int
    config: dict[str, Any]
    """The resolved run file."""
    model_shape: dict[str, Any]
    timestep_shift: float | None
    """α in force: exported with the weights, since a sampler must use the same. None for a decoder."""
    tracker_run_id: str | None
    layout: dict[str, int]
    """tp, pp, dp and zero of the ranks that saved; others may go on."""
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The content of run_state.json, to which the checkpoint adds its format."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> RunState:
        """The state that `to_json` wrote."""
        values = {field.name: content[field.name] for field in fields(RunState)}
        return RunState(**{**values, "guard": tuple(values["guard"])})


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: version(name) for name in LIBRARIES}


FREE_TO_CHANGE = {
    "data": {
        "shards",
        "cache_directory",
        "cache_limit_gib",
        "workers",
        "prefetch_batches",
        "max_corrupt_rate",
    },
    "encoders": {"decoder"},
    "encoders.text": {"cache_mib"},
    "decoder.losses.lpips": {"backbone"},
}
"""Sections that decide what a sample is and what is learned from it, and their fields that do not.
Data that moved is recognised by its fingerprint."""


DATA_FINGERPRINT = "data.fingerprint"
GLOBAL_BATCH = "training.global_batch_images"
"""The position in the data is steps × global batch: another one would skip samples or repeat them."""


def check_resumable(saved: RunState, current: RunState) -> None:
    """Raises InputError when going on from `saved` would silently be another run.

    Steps, micro-batch, layout, optimizer settings, workers, number of ranks and the like may change;
    the data and what is done to it, the network, the objective, the seed and the global batch may
    not, unless `checkpoint.allow_changed` of the current run names what does. Network and global batch
    never may.
    """
    before = {DATA_FINGERPRINT: _described_data(saved), **_fixed(saved.config)}
    now = {DATA_FINGERPRINT: _described_data(current), **_fixed(current.config)}
    changed = {
        path: f"{path} was {before.get(path)}, now {now.get(path)}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    }
    allowed = set(current.config["checkpoint"]["allow_changed"]) - {GLOBAL_BATCH}
    refused = [path for path in changed if path not in allowed]
    problems = [changed[path] for path in refused]
    if saved.model_shape != current.model_shape:
        parts = [k for k, v in current.model_shape.items() if saved.model_shape.get(k) != v]
        problems.append("another network: " + ", ".join(sorted(parts)))
    kept, wanted = (set(s.config["training"]["ema_decays"]) for s in (saved, current))
    if not wanted <= kept:
        problems.append(
            f"training.ema_decays has {', '.join(map(str, sorted(wanted - kept)))}, of which no "
            f"average was kept; there are {', '.join(map(str, sorted(kept)))}"
        )
    if problems:
        names = ",".join(path for path in refused if path != GLOBAL_BATCH)
        raise InputError(
            found="the run directory holds a checkpoint of another run: " + "; ".join(problems),
            required="the data, network, objective, seed and global batch the run was started with",
            remedy="restore those settings, or set another run directory: directory=…"
            + (f"; to go on all the same: checkpoint.allow_changed=[{names}]" if names else ""),
        )


def _described_data(state: RunState) -> str:
    return f"{state.data_fingerprint[:16]}… ({state.data_samples} samples)"


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Every setting that a resume must not change, by dotted path."""
    fixed = {
        "seed": config["seed"],
        GLOBAL_BATCH: config["training"]["global_batch_images"],
    }
    objectives = ("diffusion", "decoder")
    sections = [
        (path, config[path]) for path in ("data", "encoders", *objectives) if path in config
    ]
    while sections:
        path, section = sections.pop()
        for field, value in section.items():
            if field in FREE_TO_CHANGE.get(path, set()):
                continue
            if isinstance(value, dict):
                sections.append((f"{path}.{field}", value))
            else:
                fixed[f"{path}.{field}"] = value
    return fixed
