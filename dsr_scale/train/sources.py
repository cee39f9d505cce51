"""Where a run's latents come from: encoders in this process, servers, or a cache; all give the same.

Every way ends in the same two things: a stream of batches and the `Encoders` that finish them, on the
one rank of a replica that reads. What fixed the latents (weights, statistics, outlier treatment) is
written to the run directory, so that a run never goes on with other encoders under the old names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.directory import complete_steps
from dsr_scale.config.decoder import DecoderRun
from dsr_scale.config.encoders import NoText
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.data.encoded import RowEncoder
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import Samples
from dsr_scale.encode_service.contract import Contract
from dsr_scale.encode_service.local import build_local
from dsr_scale.encoders.contract import build_text_encoder
from dsr_scale.parallel.groups import Ranks
from dsr_scale.train.objective import Encoders

if TYPE_CHECKING:
    from dsr_scale.encode_service.prompts import ServiceText

CONTRACT_FILE = "encoders.json"

_MAY_CHANGE = {"device", "protocol"}
"""Where and how a contract is fulfilled, not what it gives."""


@dataclass(frozen=True)
class Source:
    """The data of a run and who encodes it."""

    samples: Samples
    rows: RowEncoder | None
    """Encodes in the data workers; None where batches are encoded in this process."""
    encoders: Encoders | None
    """On the rank of a replica that reads."""
    start_method: Literal["fork", "spawn"]
    """Of the data workers."""


def open_source(run: AnyRun, ranks: Ranks) -> Source:
    """Opens data and encoders as `encoder.mode` says. A collective of all ranks.

    Raises InputError when they cannot be had, or are not those that the run was started with.
    """
    match run.encoder.mode:
        case "inline":
            source, contract = _inline(run, ranks)
        case "service":
            source, contract = _service(run, ranks)
        case "cache":
            source, contract = _cache(run, ranks)
    ranks.on_first(lambda: _record(run, contract))
    return source


def _inline(run: AnyRun, ranks: Ranks) -> tuple[Source, Contract | None]:
    samples = open_samples(run.data)
    if not ranks.leads_replica:
        return Source(samples, None, None, "fork"), None
    device = ranks.device
    local = build_local(run, device)
    encoders = Encoders(run.encoders, local.image, local.text, device)
    return Source(samples, None, encoders, "fork"), local.contract if ranks.is_first else None


def _service(run: AnyRun, ranks: Ranks) -> tuple[Source, Contract]:
    from dsr_scale.encode_service.client import ServiceClient
    from dsr_scale.encode_service.prompts import ServiceText

    samples = open_samples(run.data)
    stranger = ServiceClient(run, speaks=ranks.is_first)
    contract = ranks.on_first(stranger.agree)
    client = stranger.bound_to(contract)
    stranger.close()
    has_text = isinstance(run, RunConfig) and not isinstance(run.encoders.text, NoText)
    prompts = ServiceText(client, ranks.device) if has_text else None
    if prompts is not None and isinstance(run, RunConfig) and run.grid.every_steps is not None:
        # Now, so that no grid has to wait for servers in the middle of a run.
        ranks.on_first(lambda: _ask_ahead(prompts, run.grid.prompts))
    encoders = None
    if ranks.leads_replica:
        encoders = Encoders(run.encoders, None, prompts, ranks.device)
    # gRPC, which this process has used by now, does not survive a fork.
    return Source(samples, client, encoders, "spawn"), contract


def _ask_ahead(prompts: ServiceText, captions: Sequence[str]) -> None:
    prompts.encode(captions)


def _cache(run: AnyRun, ranks: Ranks) -> tuple[Source, Contract]:
    from dsr_scale.encode_service.cache import open_cache

    samples, rows = open_cache(run)
    if isinstance(run, DecoderRun):
        samples = _source_images(run)
    encoders = None
    if ranks.leads_replica:
        # Prompts of sample grids are in no cache, so the one rank that draws encodes them itself.
        draws = ranks.is_first and isinstance(run, RunConfig) and run.grid.every_steps is not None
        text = build_text_encoder(run.encoders.text, device=ranks.device) if draws else None
        encoders = Encoders(run.encoders, None, text, ranks.device)
    return Source(samples, rows, encoders, "fork"), rows.contract


def _source_images(run: AnyRun) -> Samples:
    """What the cache was filled from: it keeps no images, and a decoder learns to make them."""
    assert run.encoder.cache is not None
    if (
        Path(run.encoder.cache).expanduser().resolve()
        == Path(run.data.shards).expanduser().resolve()
    ):
        raise InputError(
            found=f"data.shards = {run.data.shards}, the cache itself",
            required="the images that the cache was filled from: a decoder learns to make them",
            remedy="set data.shards to the shards that dsr-scale encode read",
        )
    return open_samples(run.data)


def _record(run: AnyRun, contract: Contract | None) -> None:
    """Keeps the contract with the run; refuses another than it was trained with so far."""
    assert contract is not None
    directory = Path(run.directory)
    path = directory / CONTRACT_FILE
    changed_on_purpose = any(name.startswith("encoders.") for name in run.checkpoint.allow_changed)
    if path.is_file() and complete_steps(directory) and not changed_on_purpose:
        before = Contract.from_json(path.read_bytes())
        kept = {k: v for k, v in before.values.items() if k not in _MAY_CHANGE}
        differences = contract.differences(kept)
        if differences:
            raise InputError(
                found=f"encoders that are not those of {path}: {'; '.join(differences)}",
                required="the weights, statistics and outlier treatment that the run was trained with",
                remedy="restore them, or set another run directory: directory=…",
            )
    atomic_files.write_bytes(path, contract.to_json() + b"\n")
