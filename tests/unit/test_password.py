"""etcd's password: read whatever characters it has, and never printed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from unittest import mock

import pytest
import yaml
from hypothesis import example, given, reject
from hypothesis import strategies as st

from cluster_manager.store import open_store
from pdserve.cli import main
from pdserve.config import ClusterUri, load, mask_text, masked
from pdserve.config.cluster import DisaggCluster
from pdserve.errors import ConfigError

SECRET = "s3cr3t"
"""A part of every password below that stands nowhere else."""

characters = st.characters(exclude_categories=["Cs"])
users = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=":"), min_size=1)
passwords = st.builds("{}{}{}".format, st.text(characters), st.just(SECRET), st.text(characters))
hosts = st.sampled_from(["h:1", "10.0.0.5:2379,10.0.0.6:2379", "[::1]:2379", "h:1/"])


@given(users, passwords, hosts)
@example("root", f"a/{SECRET}@b:c", "h:1")
@example("ro/ot@x", f"{SECRET}@", "[::1]:2379")
def test_any_password_is_read_and_none_is_shown(user: str, password: str, host: str) -> None:
    uri = f"etcd://{user}:{password}@{host}"
    parsed = ClusterUri.parse(uri)
    assert (parsed.user, parsed.password, parsed.endpoints) == (user, password, tuple(host.rstrip("/").split(",")))
    assert SECRET not in mask_text(f"before {uri} after")
    assert mask_text(uri) == f"etcd://{user}:***@{host}"
    cluster = DisaggCluster(cluster_uri=uri)
    for shown in (repr(parsed), str(parsed), repr(cluster), str(cluster), str(masked(cluster))):
        assert SECRET not in shown


broken: list[Callable[[str], str]] = [
    lambda p: f"etcd://root:{p}@",
    lambda p: f"etcd://root:{p}@h",
    lambda p: f"etcd://root:{p}@h:port",
    lambda p: f"etcd://root:{p}@h:1,",
    lambda p: f"etcd://root:{p}@h:1/path",
    lambda p: f"etcd://root:x{p}",
    lambda p: f"etcds://root:{p}@h:1",
    lambda p: f"memory://root:{p}@h:1",
]


@pytest.mark.parametrize("uri", broken)
@given(password=passwords)
def test_an_error_about_a_uri_does_not_repeat_its_password(uri: Callable[[str], str], password: str) -> None:
    given_uri = uri(password)
    with contextlib.suppress(ValueError):
        ClusterUri.parse(given_uri)
        reject()  # what follows the password's own "@" is a host and a port
    with pytest.raises(ConfigError) as caught:
        load(environ={"PDSERVE_MODEL": "m", "PDSERVE_DISAGG_CLUSTER__CLUSTER_URI": given_uri})
    assert SECRET not in str(caught.value)
    assert "disagg_cluster.cluster_uri" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/v1",
        "http://[::1]:8000",
        "etcd://10.0.0.5:2379,10.0.0.6:2379",
        "etcd://[::1]:2379",
        "etcd://h:2379 does not answer",
        "memory://",
        "etcd at h:1: put: no leader",
        "user@example.org",
    ],
)
def test_what_holds_no_password_is_shown_as_it_is(text: str) -> None:
    assert mask_text(text) == text


@pytest.mark.parametrize("password", [f"a/{SECRET}@b", f"{SECRET}:/@"])
def test_the_command_shows_no_password(password: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"etcd://root:{password}@h:2379"
    assert main(["config", "--model=m", f"--disagg_cluster.cluster_uri={uri}"]) == 0
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert yaml.safe_load(shown.out)["disagg_cluster"]["cluster_uri"] == "etcd://root:***@h:2379"
    for mistake in (f"disagg_cluster.cluster_uri={uri}", f"--disagg_cluster.cluster_url={uri}", f"--{uri}"):
        with contextlib.suppress(SystemExit):
            assert main(["config", "--model=m", mistake]) == 2
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err


@pytest.mark.etcd
async def test_a_stores_errors_show_no_password() -> None:
    pytest.importorskip("etcd3aio")
    store = open_store(f"etcd://root:a/{SECRET}@b@127.0.0.1:1")
    with mock.patch("sys.stderr", io.StringIO()), pytest.raises(Exception, match=r"127\.0\.0\.1:1") as caught:
        await store.get("k")
    await store.close()
    assert SECRET not in str(caught.value)


def test_what_an_address_looks_like_is_shown_in_full() -> None:
    with pytest.raises(ConfigError) as raised:
        load([], ["--model=m", "--disagg_cluster.cluster_uri=foo://"])
    assert "allowed: memory://, etcd://host:2379[,host:2379...], with" in mask_text(str(raised.value))
