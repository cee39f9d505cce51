"""Everything that a resumed run needs besides tensors, in one place and one JSON file.

Noise, timesteps, captions and order are functions of the seed and the sample, so there is no
generator state to keep: the position is one integer, the number of consumed samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from dsr_scale.base.errors import InputError

LIBRARIES = (
    "torch",
    "deepspeed",
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
    corrupt_seen: int
    data_fingerprint: str
    data_samples: int
    config: dict[str, Any]
    """The resolved run file."""
    model_shape: dict[str, Any]
    timestep_shift: float
    """α in force: exported with the weights, since a sampler must use the same."""
    tracker_run_id: str | None
    world_size: int
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The content of run_state.json."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> RunState:
        """The state that `to_json` wrote."""
        return RunState(**content)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: version(name) for name in LIBRARIES}


def check_resumable(saved: RunState, current: RunState) -> None:
    """Raises InputError when going on from `saved` would silently be another run.

    Steps, micro-batch, learning rate, workers, number of ranks and the like may change; the data,
    the network, the seed and the global batch may not.
    """
    problems = []
    if saved.data_fingerprint != current.data_fingerprint:
        problems.append(
            f"data fingerprint {saved.data_fingerprint[:16]}… ({saved.data_samples} samples), now "
            f"{current.data_fingerprint[:16]}… ({current.data_samples} samples)"
        )
    if saved.model_shape != current.model_shape:
        changed = [k for k, v in current.model_shape.items() if saved.model_shape.get(k) != v]
        problems.append("another network: " + ", ".join(sorted(changed)))
    for path in ("seed", "training.global_batch_images", "encoders", "diffusion"):
        before, now = _at(saved.config, path), _at(current.config, path)
        if before != now:
            problems.append(f"{path} was {before}, now {now}")
    if problems:
        raise InputError(
            found="the run directory holds a checkpoint of another run: " + "; ".join(problems),
            required="the data, network, seed and global batch the run was started with",
            remedy="restore those settings, or set another run directory: directory=…",
        )


def _at(config: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        config = config[part]
    return config
