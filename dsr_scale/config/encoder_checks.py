"""What must fit together between the frozen encoders, the way to them, and the data.

Addresses and limits are checked in every mode: `dsr-scale serve` reads the same file as the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsr_scale.base.errors import InputError
from dsr_scale.config.addresses import LAST_PORT, is_host, parse_address
from dsr_scale.config.encoders import (
    AttentionBias,
    TestTimeRegisters,
    VitImage,
    Zeroing,
)
from dsr_scale.config.run import AnyRun
from dsr_scale.config.shape_checks import Problems

OTHER_RANKS_WAIT_S = 1800
"""Ranks that hear nothing from one that waits for servers end after this long without saving
(`parallel.groups`, which this room does not import)."""

LONGEST_WAIT_S = 1500
"""So a rank must have given up by then, with time left to save."""


def cache_problems(run: AnyRun) -> Problems:
    """What a run needs that reads a latent cache."""
    if run.encoder.mode != "cache":
        return
    if run.encoder.cache is None:
        yield InputError(
            found="encoder.mode = cache, no encoder.cache",
            required="the directory that `dsr-scale encode` wrote",
            remedy="set encoder.cache, or encoder.mode to inline or service",
        )
    yield from changing_view_problems(run)


def changing_view_problems(run: AnyRun) -> Problems:
    """A cache holds one view of each image and its mirror image, so the data must ask for no other.

    Whatever `encoder.mode` is: a cache is filled with the run file of a run that encodes, too.
    """
    if run.data.crop != "center":
        yield InputError(
            found=f"a latent cache with data.crop = {run.data.crop}",
            required="data.crop = center: a random crop is another image every time, and a cache's "
            "would be the same in every epoch",
            remedy="set data.crop to center, or encoder.mode to inline or service",
        )
    if run.data.buckets:
        yield InputError(
            found=f"a latent cache with {len(run.data.buckets)} data.buckets",
            required="squares of data.resolution: images left over from their bucket train at a "
            "neighbour's size, others in every epoch, and a cache would need every image at every size",
            remedy="remove data.buckets, or set encoder.mode to inline or service",
        )


def waiting_problems(run: AnyRun) -> Problems:
    """How long a rank may wait for servers while the others wait for it."""
    access = run.encoder
    if access.give_up_after_s >= LONGEST_WAIT_S:
        yield InputError(
            found=f"encoder.give_up_after_s = {access.give_up_after_s:g}",
            required=f"less than {LONGEST_WAIT_S}: ranks that hear nothing from a waiting one end "
            f"after {OTHER_RANKS_WAIT_S} s without saving",
            remedy="lower encoder.give_up_after_s; a job that ended goes on from its checkpoint",
        )
    elif access.give_up_after_s + 2 * access.request_timeout_s >= OTHER_RANKS_WAIT_S:
        yield InputError(
            found=f"encoder.request_timeout_s = {access.request_timeout_s:g}, "
            f"encoder.give_up_after_s = {access.give_up_after_s:g}",
            required=f"less than {OTHER_RANKS_WAIT_S} together, the first twice: a request stalls "
            "before the waiting begins, and one may stall at its end",
            remedy="lower encoder.request_timeout_s or encoder.give_up_after_s",
        )


def request_problems(run: AnyRun) -> Problems:
    """A request is a micro-batch, and a server sets memory aside for its decoded pixels."""
    if run.encoder.mode != "service":
        return
    side, rows = run.data.resolution, run.training.microbatch_images
    pixels = max([side * side, *(height * width for height, width in run.data.buckets)])
    limit = run.encoder.server.max_request_mib
    if rows * 3 * pixels > limit << 20:
        yield InputError(
            found=f"encoder.mode = service, training.microbatch_images = {rows}, whose pixels take "
            f"{rows * 3 * pixels / 2**20:.0f} MiB",
            required=f"at most encoder.server.max_request_mib = {limit}",
            remedy="raise encoder.server.max_request_mib or lower training.microbatch_images",
        )


def address_problems(run: AnyRun) -> Problems:
    """`host:port` of servers, and one port for each of them."""
    server = run.encoder.server
    parsed = parse_address(server.listen)
    port = parsed[1] if parsed else 0
    if parsed is None:
        yield _no_address("encoder.server.listen", server.listen, "0 takes a free port")
    elif port and server.devices and port + server.devices - 1 > LAST_PORT:
        yield InputError(
            found=f"encoder.server.listen = {server.listen}, encoder.server.devices = "
            f"{server.devices}",
            required=f"ports that count up to at most {LAST_PORT}",
            remedy="lower the port in encoder.server.listen, or set it to 0 for free ports",
        )
    for index, address in enumerate(run.encoder.servers):
        parsed = parse_address(address)
        if parsed is None or parsed[1] == 0:
            yield _no_address(f"encoder.servers[{index}]", address, "as a server prints it")
        if address in run.encoder.servers[:index]:
            yield InputError(
                found=f"encoder.servers[{index}] = {address}, which is there before",
                required="each server once",
                remedy=f"remove encoder.servers[{index}]",
            )
    if server.advertise is not None and not is_host(server.advertise):
        yield InputError(
            found=f"encoder.server.advertise = {server.advertise!r}",
            required="a host name or an address, without a port: each server has its own",
            remedy="set encoder.server.advertise to the name under which clients reach the machine",
        )


def credential_problems(run: AnyRun) -> Problems:
    """Credentials that nothing would use."""
    if run.encoder.plain and run.encoder.credentials is not None:
        yield InputError(
            found=f"encoder.plain = true, encoder.credentials = {run.encoder.credentials}",
            required="either connections without token and TLS, or credentials for them",
            remedy="remove encoder.plain or encoder.credentials",
        )


def treatment_problems(run: AnyRun) -> Problems:
    """Local files that a treatment of outlier tokens reads; shipped ones are found when loaded."""
    image = run.encoders.image
    if not isinstance(image, VitImage):
        return
    files: dict[str, str] = {}
    match image.outliers:
        case TestTimeRegisters(neurons=neurons) | Zeroing(neurons=neurons):
            files = {"neurons": neurons}
        case AttentionBias(neurons=neurons, bias=bias):
            files = {"neurons": neurons, "bias": bias}
    for field, path in files.items():
        if not path.startswith("package:") and not Path(path).expanduser().is_file():
            yield InputError(
                found=f"encoders.image.outliers.{field} = {path}, which is no file",
                required="a file that `dsr-scale registers` wrote, or package:NAME",
                remedy="correct the path, or run dsr-scale registers on this config",
            )


def _no_address(name: str, address: str, port: str) -> InputError:
    return InputError(
        found=f"{name} = {address!r}",
        required=f"host:port, an IPv6 host in brackets; {port}",
        remedy=f"write {name} like 10.0.0.5:50051 or [fd00::5]:50051",
    )


ENCODER_CHECKS: tuple[Callable[[AnyRun], Problems], ...] = (
    cache_problems,
    waiting_problems,
    request_problems,
    address_problems,
    credential_problems,
    treatment_problems,
)
