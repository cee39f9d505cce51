"""Who may ask a server, and how a client knows that it is one: a shared token over TLS.

The first server makes both, in a directory that only its user can read; every other server and every
trainer that can read the directory belongs. TLS shows clients that a server holds the key of that
directory, the token shows servers that a client has read it. On loopback neither is used: who can
connect there can read the user's files or is kept out by the machine. The CA's key is thrown away once
it has signed, so nothing else can ever be signed by it.
"""

from __future__ import annotations

import datetime
import hmac
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.run import AnyRun
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.addresses import is_loopback, split_address

if TYPE_CHECKING:
    import grpc

SERVER_NAME = "dsr-scale-encoder"
"""What every certificate is made out to: machines come and go, the name stays."""

TOKEN_FILE, CA_FILE, CERTIFICATE_FILE, KEY_FILE = "token", "ca.pem", "server.pem", "server.key"
_FILES = (TOKEN_FILE, CA_FILE, CERTIFICATE_FILE, KEY_FILE)
_VALID_DAYS = 3650
MESSAGE_BYTES = wire.CHUNK_BYTES + (64 << 10)
"""Largest single gRPC message, either way."""


@dataclass(frozen=True)
class Credentials:
    """What the directory holds."""

    token: str
    authority: bytes
    certificate: bytes
    key: bytes

    def accepts(self, metadata: Any) -> bool:
        """Whether a call's metadata carries the token; takes equally long for any wrong one."""
        given = [value for name, value in metadata or () if name == wire.TOKEN_METADATA]
        wanted = f"Bearer {self.token}".encode()
        return len(given) == 1 and hmac.compare_digest(_as_bytes(given[0]), wanted)


def credentials_directory(run: AnyRun) -> Path:
    """Where the token and the certificate of `run` are."""
    chosen = run.encoder.credentials
    if chosen is None:
        return Path(run.directory) / "encoder_credentials"
    return Path(chosen).expanduser()


def is_guarded(host: str, run: AnyRun) -> bool:
    """Whether a server at `host` wants TLS and the token."""
    return not run.encoder.plain and not is_loopback(host)


def ensure_credentials(directory: Path) -> Credentials:
    """Those in `directory`, made first if there are none.

    Servers that start at once agree: each prepares a directory, one rename wins. Raises InputError when
    the directory holds something else, or others may read it.
    """
    if not (directory.is_dir() and any(directory.iterdir())):
        with atomic_files.storage_errors(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            prepared = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
            try:
                _write_new(prepared)
                prepared.rename(directory)
            except OSError:
                shutil.rmtree(prepared, ignore_errors=True)
                if not (directory.is_dir() and any(directory.iterdir())):
                    raise
    return read_credentials(directory)


def read_credentials(directory: Path) -> Credentials:
    """What `ensure_credentials` made. Raises InputError when it is not there, or others may read it."""
    try:
        token, authority, certificate, key = (_private_bytes(directory / name) for name in _FILES)
    except OSError as error:
        raise InputError(
            found=f"no {Path(str(error.filename)).name} in {directory}: {error.strerror}",
            required="the credentials of this run's encoder servers",
            remedy="start dsr-scale serve with the same run directory or encoder.credentials first; "
            "copy the directory to machines that do not share the disk",
        ) from error
    return Credentials(token.decode().strip(), authority, certificate, key)


def server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    """For a port with TLS."""
    import grpc

    return grpc.ssl_server_credentials([(credentials.key, credentials.certificate)])


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """Accepts servers of these credentials and no others."""
    import grpc

    return grpc.ssl_channel_credentials(root_certificates=credentials.authority)


def open_channel(address: str, run: AnyRun) -> grpc.Channel:
    """A connection to a server, guarded unless it is on loopback or `encoder.plain`.

    Raises InputError for an address that is none, or when the credentials are missing.
    """
    import grpc

    host, _ = split_address(address)
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        # A dead machine sends no reset: pings find out within half a minute.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # Also how long a connection may take to come about, TLS included.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A proxy of the environment is for the internet, not for servers of this run.
        ("grpc.enable_http_proxy", 0),
    ]
    if not is_guarded(host, run):
        return grpc.insecure_channel(address, options=options)
    credentials = channel_credentials(read_credentials(credentials_directory(run)))
    options.append(("grpc.ssl_target_name_override", SERVER_NAME))
    return grpc.secure_channel(address, credentials, options=options)


def call_metadata(address: str, run: AnyRun) -> tuple[tuple[str, str], ...]:
    """What every call to `address` carries: the token, and nothing where it would go in clear text.

    Raises InputError for an address that is none, or when the credentials are missing.
    """
    host, _ = split_address(address)
    if not is_guarded(host, run):
        return ()
    token = read_credentials(credentials_directory(run)).token
    return ((wire.TOKEN_METADATA, f"Bearer {token}"),)


def _write_new(directory: Path) -> None:
    """A token, an authority, and a certificate of it for `SERVER_NAME`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_name = named(f"{SERVER_NAME} authority {secrets.token_hex(4)}")

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(authority_name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        # Clocks of machines differ.
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        return builder.not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))

    authority = certificate(authority_name, authority_key).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    server = certificate(named(SERVER_NAME), server_key).add_extension(
        x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False
    )
    pem = serialization.Encoding.PEM
    key_text = server_key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, content in (
        (TOKEN_FILE, f"{secrets.token_urlsafe(32)}\n".encode()),
        (CA_FILE, authority.sign(authority_key, hashes.SHA256()).public_bytes(pem)),
        (CERTIFICATE_FILE, server.sign(authority_key, hashes.SHA256()).public_bytes(pem)),
        (KEY_FILE, key_text),
    ):
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _private_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise InputError(
                found=f"{path} can be read by other users",
                required="credentials that only their owner can read",
                remedy=f"chmod 700 {path.parent} and chmod 600 its files; if others may have read "
                "them, remove the directory and restart all servers",
            )
        return file.read()


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
