"""Beyond loopback only those with the token get in, and only servers with the key are believed."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_encoders import (
    TIMEOUT_S,
    apart,
    ask,
    assert_same,
    encode,
    file_rows,
    refusal,
    running,
    tiny_run,
)

from dsr_scale.base.errors import InputError
from dsr_scale.encode_service import credentials, wire

BEYOND = ("encoder.server.listen=0.0.0.0:0", "encoder.server.advertise=0.0.0.0")
"""Not a loopback address, and yet this machine."""


def test_the_first_makes_them_and_all_agree(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "credentials"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: credentials.ensure_credentials(directory), range(8)))
    assert len(set(made)) == 1
    assert made[0] == credentials.read_credentials(directory)
    assert [path.name for path in directory.parent.iterdir()] == ["credentials"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert len(made[0].token) >= 32
    other = credentials.ensure_credentials(tmp_path / "other")
    assert other.token != made[0].token and other.key != made[0].key


def test_the_certificate_is_of_the_authority_and_the_key(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    made = credentials.ensure_credentials(tmp_path / "credentials")
    authority = x509.load_pem_x509_certificate(made.authority)
    certificate = x509.load_pem_x509_certificate(made.certificate)
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [credentials.SERVER_NAME]
    key = serialization.load_pem_private_key(made.key, None)
    assert key.public_key() == certificate.public_key()
    assert authority.public_key() != certificate.public_key()
    validity = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert validity.days > 3650


def test_credentials_that_others_can_read_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "credentials"
    credentials.ensure_credentials(directory)
    (directory / credentials.TOKEN_FILE).chmod(0o640)
    for read in (credentials.ensure_credentials, credentials.read_credentials):
        with pytest.raises(InputError, match="can be read by other users"):
            read(directory)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no token in"):
        credentials.ensure_credentials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_only_the_token_is_accepted(tmp_path: Path) -> None:
    made = credentials.ensure_credentials(tmp_path / "credentials")
    right = (wire.TOKEN_METADATA, f"Bearer {made.token}")
    assert made.accepts((("x", "y"), right))
    for wrong in (
        (),
        None,
        ((wire.TOKEN_METADATA, made.token),),
        ((wire.TOKEN_METADATA, f"Bearer {made.token}x"),),
        ((wire.TOKEN_METADATA, "Bearer ö"),),
        ((wire.TOKEN_METADATA, b"\xff"),),
        (right, right),
    ):
        assert not made.accepts(wrong)


def test_without_credentials_a_client_is_told_what_to_do(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with pytest.raises(InputError, match="start dsr-scale serve"):
        credentials.open_channel("node-1:7070", run)
    with pytest.raises(InputError, match="host:port"):
        credentials.open_channel("node-1", run)
    with pytest.raises(InputError, match="start dsr-scale serve"):
        credentials.call_metadata("node-1:7070", run)


def test_the_token_goes_only_where_it_is_encrypted(tmp_path: Path) -> None:
    run, plain = tiny_run(tmp_path), tiny_run(tmp_path, "encoder.plain=true")
    made = credentials.ensure_credentials(credentials.credentials_directory(run))
    sent = ((wire.TOKEN_METADATA, f"Bearer {made.token}"),)
    assert credentials.call_metadata("node-1:7070", run) == sent
    assert credentials.call_metadata("node-1:7070", plain) == ()
    for loopback in ("127.0.0.1:7070", "[::1]:7070", "localhost:7070"):
        assert credentials.call_metadata(loopback, run) == ()


def test_where_guards_stand(tmp_path: Path) -> None:
    run, plain = tiny_run(tmp_path), tiny_run(tmp_path, "encoder.plain=true")
    assert credentials.is_guarded("0.0.0.0", run) and credentials.is_guarded("node", run)
    assert not credentials.is_guarded("127.0.0.1", run)
    assert not credentials.is_guarded("0.0.0.0", plain)
    chosen = tiny_run(tmp_path, f"encoder.credentials={tmp_path / 'mine'}")
    assert credentials.credentials_directory(chosen) == tmp_path / "mine"
    assert credentials.credentials_directory(run) == tmp_path / "run" / "encoder_credentials"


@apart
def test_strangers_stay_outside_and_members_are_served(tmp_path: Path) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    run = tiny_run(tmp_path, *BEYOND)
    (tmp_path / "other").mkdir()
    stranger = tiny_run(tmp_path / "other", *BEYOND)
    credentials.ensure_credentials(credentials.credentials_directory(stranger))
    with running(run) as server:
        address = server.ready.address
        request = wire.EncodeRequest(server.ready.fingerprint, (32, 32), tuple(file_rows(2)))
        token = credentials.call_metadata(address, run)
        with credentials.open_channel(address, run) as channel:
            served = encode(channel, run, request, token)
            describe = channel.unary_unary(f"/{wire.SERVICE}/{wire.DESCRIBE}")
            for metadata in ((), credentials.call_metadata(address, stranger)):
                for call in (
                    lambda metadata=metadata: ask(channel, request.chunks(), metadata),
                    lambda metadata=metadata: describe(b"", metadata=metadata, timeout=TIMEOUT_S),
                ):
                    status, text = refusal(call)
                    assert status == "UNAUTHENTICATED" and "token" in text
            assert server.outcomes("stranger") == 2
            # Probes have no token.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        unencrypted = grpc.insecure_channel(address)
        unbelieving = credentials.open_channel(address, stranger)
        for channel in (unencrypted, unbelieving):
            with channel:
                status, _ = refusal(lambda c=channel: ask(c, request.chunks(), token))
                assert status == "UNAVAILABLE"
        with credentials.open_channel(address, run) as channel:
            assert_same(encode(channel, run, request, token), served)


@apart
def test_plain_means_neither_token_nor_tls(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, *BEYOND, "encoder.plain=true")
    with (
        running(run) as server,
        credentials.open_channel(server.ready.address, run) as channel,
    ):
        request = wire.EncodeRequest(server.ready.fingerprint, (32, 32), tuple(file_rows(1)))
        token = credentials.call_metadata(server.ready.address, run)
        assert len(encode(channel, run, request, token).latents) == 1
        assert not credentials.credentials_directory(run).exists()
