"""Where a run's latents and caption tokens come from: this process, encoder servers, or a cache on disk."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dsr_scale.config.section import Section


class ServerConfig(Section):
    """How `dsr-scale serve` serves the encoders of this file."""

    listen: str = "127.0.0.1:0"
    """Address of the first device's server; the others count up from its port. Port 0 takes a free one
    for each. Beyond loopback, clients need the credentials."""
    advertise: str | None = None
    """Host name under which clients reach this machine; None asks the machine."""
    devices: int | None = Field(default=None, gt=0)
    """Server processes, one per device. None is every GPU, or one process on the CPU."""
    metrics_port: int = Field(default=0, ge=0, lt=65_536)
    """Port of the first device's metrics page; the others count up. Port 0 takes a free one for each."""
    batch_images: int = Field(default=64, gt=0)
    """Images of several requests that are encoded together, at most."""
    batch_wait_ms: float = Field(default=2.0, ge=0)
    """How long a batch that is not full waits for more."""
    credits: int = Field(default=8, gt=0)
    """Requests that may be inside one server; a client sends its images only when it was granted one."""
    max_request_mib: int = Field(default=64, gt=0)
    """Largest request, in MiB; with `credits` it bounds the memory that waiting requests take."""
    decode_threads: int = Field(default=4, gt=0)
    """Threads that decode images while others are encoded."""
    cache_directory: str | None = None
    """Disk cache of latents that all servers of this machine share; None keeps nothing."""
    cache_gib: float = Field(default=50.0, gt=0)
    """Size of the disk cache; the least recently used latents go first."""


class EncoderAccess(Section):
    """Which way the encoders are reached. Latents are the same either way."""

    mode: Literal["inline", "service", "cache"] = "inline"
    """`inline` encodes on the training device, `service` asks servers, `cache` reads what
    `dsr-scale encode` wrote."""
    servers: tuple[str, ...] = ()
    """host:port of servers, beside those in the registry."""
    registry: str | None = None
    """Directory where running servers write their address, read again while training; None is
    `encoder_servers` in the run directory."""
    credentials: str | None = None
    """Directory with the token and the certificate for servers beyond loopback; the first server makes
    it. None is `encoder_credentials` in the run directory."""
    plain: bool = False
    """No token and no TLS beyond loopback either: only for a network that nobody else is on."""
    send: Literal["files", "pixels"] = "files"
    """What servers are sent: image files as they are stored, or pixels decoded by the data workers."""
    request_timeout_s: float = Field(default=60.0, gt=0)
    """After this long without an answer the request goes to another server."""
    give_up_after_s: float = Field(default=600.0, gt=0)
    """How long training waits when no server answers, before it saves and ends."""
    cache: str | None = None
    """Directory that `dsr-scale encode` wrote."""
    server: ServerConfig = ServerConfig()
