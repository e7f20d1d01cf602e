"""What the manager takes for a registration."""

from __future__ import annotations

from typing import Any

import pytest

from cluster_manager.admission import check_registration
from pdserve.cluster_api import WorkerInfo
from pdserve.errors import RequestError
from tests.manager import worker

KV = {"worker_id": "w1", "instance": "i", "host": "h", "port": 7, "layout_hash": "l"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(
            ({"url": url}, "info.url")
            for url in (
                *("", "h:1", "http://h", "http://:1", "http://h:0", "http://h:99999", "http://h:x", "ftp://h:1"),
                *(
                    "http://h:1/v1",
                    "http://h:1?x=1",
                    "http://h:1#x",
                    "http://h:1//",
                    "http://user@h:1",
                    "http://a:b@h:1",
                ),
                *(
                    "http://h:1\nERROR all is lost",
                    "http://h :1",
                    "http://h:1\x1b[2J",
                    "http://h\u2028:1",
                    "http://h\\x:1",
                ),
                *("http://0.0.0.0:1", "http://[::]:1", "http://[::ffff:0.0.0.0]:1", "http://0:1", "http://[0:0::0]:1"),
                *("http://[::1:1", "http://" + "h" * 300 + ":1"),
            )
        ),
        ({"worker_id": "w" * 201}, "info.worker_id"),
        ({"incarnation": "1" * 65}, "info.incarnation"),
        ({"model": "m\nERROR all is lost"}, "info.model"),
        ({"model": "m" * 1025}, "info.model"),
        ({"device": "\x1b]0;x\x07"}, "info.device"),
        ({"max_seq_len": 0}, "info.max_seq_len"),
        ({"tokens_per_block": -1}, "info.tokens_per_block"),
        ({"kv": {**KV, "host": "0.0.0.0"}}, "info.kv.host"),
        ({"kv": {**KV, "host": "a\nb"}}, "info.kv.host"),
        ({"kv": {**KV, "port": 65536}}, "info.kv.port"),
        ({"kv": {**KV, "ranks": [{"instance": "i", "host": "::", "port": 7, "layout": ""}]}}, "info.kv.ranks.0.host"),
    ],
)
def test_a_registration_that_would_harm_others_is_refused(fields: dict[str, Any], param: str) -> None:
    info = WorkerInfo.model_validate({**worker("w1").model_dump(mode="json"), **fields})
    with pytest.raises(RequestError) as caught:
        check_registration(info)
    assert caught.value.param == param
    assert caught.value.message.isprintable(), "nothing of it is repeated"


@pytest.mark.parametrize(
    "url",
    ["http://h:1", "https://h.example:65535/", "http://10.0.0.1:80", "http://[::1]:8000", "http://[fe80::1%25e]:1"],
)
def test_every_address_of_a_worker_is_taken(url: str) -> None:
    check_registration(
        worker("w1", url=url, kv={**KV, "ranks": [{"instance": "i", "host": "", "port": 0, "layout": "{}"}]})
    )
