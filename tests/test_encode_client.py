"""Whatever one server does, the client's answer is the right one; and it never takes another encoder's."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fake_encoders import (
    Gate,
    apart,
    as_pixels,
    assert_same,
    decoded,
    file_rows,
    picture,
    running,
    tiny_run,
)
from misbehaving_server import (
    Misbehaviour,
    babbling,
    dropping,
    fewer,
    flipping,
    huge,
    late,
    misbehaving,
    mute,
    padded,
    reordering,
    reshaping,
    retyping,
    right,
    silent,
    stalling,
    tiny,
    truncating,
)

from dsr_scale.base.errors import InputError
from dsr_scale.config.run import RunConfig
from dsr_scale.data.encoded import Encoded, EncodersLost, Row
from dsr_scale.data.transforms import CENTRE
from dsr_scale.encode_service.client import ServiceClient
from dsr_scale.encode_service.local import build_local
from dsr_scale.encode_service.prompts import ServiceText
from dsr_scale.encoders.contract import build_text_encoder

TARGET = (32, 32)
FAULTS: tuple[Misbehaviour, ...] = (
    dropping,
    truncating,
    reordering,
    flipping,
    babbling,
    silent,
    huge,
    fewer,
    reshaping,
    retyping,
    tiny,
    mute,
    padded,
    late,
    stalling,
)


def asking(run: RunConfig, *addresses: str, **settings: object) -> RunConfig:
    access = run.encoder.model_copy(update={"servers": addresses, **settings})
    return run.model_copy(update={"encoder": access})


def agreed(run: RunConfig) -> ServiceClient:
    client = ServiceClient(run, speaks=False)
    try:
        return client.bound_to(client.agree())
    finally:
        client.close()


def locally(run: RunConfig, rows: list[Row]):
    encoders = build_local(run, torch.device("cpu"))
    return encoders.encode(decoded(rows, run, TARGET), [row.caption for row in rows])


@apart
def test_answers_are_those_of_the_encoders_in_this_process(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with running(run):
        client = pickle.loads(pickle.dumps(agreed(run)))
        for rows in (file_rows(5), as_pixels(file_rows(5), run, TARGET)):
            assert_same(client.encode(rows, TARGET), locally(run, rows))
        broken = [*file_rows(2), Row(-1, b"no image", CENTRE, "broken")]
        assert list(client.encode(broken, TARGET).failures) == [2]
        client.close()


@apart
def test_every_fault_of_one_server_is_made_good_by_another(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    rows = file_rows(3)
    wanted = locally(run, rows)
    for fault in FAULTS:
        with misbehaving(run, fault) as bad, misbehaving(run) as good:
            patience = {"request_timeout_s": 0.3} if fault in (late, stalling) else {}
            client = agreed(asking(run, bad.address, good.address, **patience))
            for _ in range(4):
                assert_same(client.encode(rows, TARGET), wanted)
            client.close()
        assert bad.asked >= 1, fault.__name__
        assert good.asked == 4, fault.__name__


@apart
def test_a_server_that_would_give_other_latents_is_refused_by_name(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    lie = {"image.patch": "16", "image.weights": "ffff"}
    with misbehaving(run, lie=lie) as liar:
        with pytest.raises(InputError, match=r"image\.patch is 16, wanted 8"):
            agreed(asking(run, liar.address))
        with misbehaving(run) as honest:
            client = agreed(asking(run, liar.address, honest.address))
            for _ in range(4):
                client.encode(file_rows(1), TARGET)
            client.close()
        assert (liar.asked, honest.asked) == (0, 4)


@apart
def test_all_servers_must_have_the_weights_of_the_first(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with misbehaving(run, lie={"image.weights": "aaaa"}) as first:
        bound = agreed(asking(run, first.address))
        with misbehaving(run, lie={"image.weights": "bbbb"}) as second:
            both = asking(run, first.address, second.address, give_up_after_s=0.5)
            client = ServiceClient(both, bound.contract, speaks=False)
            for _ in range(4):
                client.encode(file_rows(1), TARGET)
            assert second.asked == 0
            client.close()
        alone = asking(run, second.address, give_up_after_s=0.5)
        with pytest.raises(EncodersLost):
            ServiceClient(alone, bound.contract, speaks=False).encode(file_rows(1), TARGET)


def ask_at_once(client: ServiceClient, rows: list[Row], count: int) -> list[Future[Encoded]]:
    """As that many data workers would."""
    pool = ThreadPoolExecutor(count)
    workers = [pickle.loads(pickle.dumps(client)) for _ in range(count)]
    return [pool.submit(worker.encode, rows, TARGET) for worker in workers]


@apart
def test_full_servers_are_waited_for(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.credits=1")
    gate, rows = Gate(), file_rows(2)
    with running(run, hook=gate) as full:
        client = agreed(run)
        answers = ask_at_once(client, rows, 3)
        assert gate.arrived.acquire(timeout=20)
        deadline_s = time.monotonic() + 20
        while not full.outcomes("busy"):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert not any(answer.done() for answer in answers)
        gate.open()
        for answer in answers:
            assert_same(answer.result(20), locally(run, rows))
        client.close()


@apart
def test_a_server_that_is_full_for_ever_is_given_up_in_time(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.credits=1", "encoder.give_up_after_s=2.5")
    gate = Gate()
    with running(run, hook=gate):
        client = agreed(run)
        started_s = time.monotonic()
        answers = ask_at_once(client, file_rows(2), 3)
        for answer in answers:
            with pytest.raises(EncodersLost):
                answer.result(20)
        assert time.monotonic() - started_s < 6
        gate.open()
        client.close()


@apart
def test_a_server_that_hangs_is_avoided_while_there_is_another(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.request_timeout_s=0.3")
    with misbehaving(run, late) as hanging, misbehaving(run) as good:
        client = agreed(asking(run, hanging.address, good.address))
        for _ in range(40):
            client.encode(file_rows(1), TARGET)
            time.sleep(0.02)
        client.close()
        assert good.asked == 40
        assert hanging.asked == 1


@apart
def test_nobody_there_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.give_up_after_s=1.0")
    started_s = time.monotonic()
    with pytest.raises(EncodersLost, match="none is registered") as lost:
        agreed(run)
    assert 1.0 <= time.monotonic() - started_s < 10
    assert isinstance(pickle.loads(pickle.dumps(lost.value)), EncodersLost)


@apart
def test_servers_that_come_later_are_found(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    found: list[ServiceClient] = []
    waiting = threading.Thread(target=lambda: found.append(agreed(run)))
    waiting.start()
    time.sleep(0.5)
    with running(run):
        waiting.join(20)
        assert_same(found[0].encode(file_rows(2), TARGET), locally(run, file_rows(2)))
        found[0].close()


@apart
def test_what_every_server_refuses_is_an_error_not_a_wait(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.max_request_mib=1")
    rows = [Row(-1, picture(0, size=(1200, 900)), CENTRE, "too large")]
    with running(run):
        client = agreed(run)
        with pytest.raises(InputError, match="allowed"):
            client.encode(rows, TARGET)
        client.close()


@apart
def test_prompts_are_encoded_once_and_as_by_the_encoder_itself(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    prompts = [f"prompt {number}" for number in range(20)] + ["prompt 3"]
    wanted = build_text_encoder(run.encoders.text, device="cpu")
    assert wanted is not None
    with misbehaving(run, right) as server:
        text = ServiceText(agreed(asking(run, server.address)), torch.device("cpu"))
        for _ in range(2):
            got, expected = text.encode(prompts), wanted.encode(prompts)
            assert torch.equal(got.tokens, expected.tokens)
            assert torch.equal(got.mask, expected.mask)
        assert server.asked == 2
