"""What a session makes of single answers, and who it is to the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controller.access import Access, NoCluster
from controller.core.session import Failure, Session
from tests.apiserver.store import line, status

RECORDINGS = Path(__file__).parents[1] / "data" / "k8s"


ANNOTATIONS = {"k8s.io/initial-events-end": "true"}
END = {"metadata": {"resourceVersion": "900", "annotations": ANNOTATIONS}}


def new_session() -> Session:
    return Session("a=b", lambda low, high: (low + high) / 2)


def test_the_recorded_refusals_are_understood() -> None:
    for name, failure in (
        ("unauthorized-401", Failure.UNAUTHORIZED),
        ("forbidden-403", Failure.FORBIDDEN),
    ):
        record = json.loads((RECORDINGS / f"{name}.json").read_text())
        session = new_session()
        session.next(0.0)
        session.refused(record["status"], json.dumps(record["body"]).encode(), None, 0.1)
        assert session.failures[failure] == 1
        assert record["body"]["message"] in (session.trouble or "")


def test_a_version_of_another_life_of_the_server_is_given_up() -> None:
    """After etcd was restored from a backup, versions are lower than the one that we have."""
    session = new_session()
    session.next(0.0)
    session.opened(0.1)
    assert session.feed(line("BOOKMARK", END), 0.2)
    session.ended(20.0)
    query = session.next(30.0)
    assert query
    assert query["resourceVersion"] == "900"
    said = status(504, "Timeout", "Too large resource version: 900, current: 300")
    said["details"] = {"causes": [{"reason": "ResourceVersionTooLarge"}]}
    session.refused(504, json.dumps(said).encode(), None, 30.1)
    query = session.next(40.0)
    assert query
    assert query["sendInitialEvents"] == "true"
    assert session.slices == {}


def test_a_piece_without_end_is_not_kept() -> None:
    session = new_session()
    session.next(0.0)
    session.opened(0.1)
    for _ in range(17):
        if not session.done:
            session.feed(b"x" * (1 << 20), 0.2)
    assert session.failures[Failure.MALFORMED] == 1


# ---------------------------------------------------------------- who we are


def test_a_pod_finds_its_server_and_its_account(tmp_path: Path) -> None:
    for name, content in (("token", "t\n"), ("ca.crt", ""), ("namespace", "inference\n")):
        (tmp_path / name).write_text(content)
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    access = Access.find(environ, account=tmp_path)
    assert (access.url, access.namespace) == ("https://[fd00::1]:6443", "inference")
    assert access.headers() == {"Authorization": "Bearer t"}
    given = Access.find({}, url="http://127.0.0.1:8001/", namespace="n", account=tmp_path)
    assert (given.url, given.headers()) == ("http://127.0.0.1:8001", {})


def test_without_a_cluster_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NoCluster, match="KUBERNETES_SERVICE_HOST"):
        Access.find({}, account=tmp_path)
    with pytest.raises(NoCluster, match="service account"):
        Access.find({"KUBERNETES_SERVICE_HOST": "h"}, account=tmp_path)
    with pytest.raises(NoCluster, match="namespace"):
        Access.find({}, url="http://h", account=tmp_path)


def test_a_set_is_taken_anew_now_and_then() -> None:
    """So that nothing that a watch ever missed lasts for ever."""
    session = new_session()
    now, phases = 0.0, []
    while now < 2000.0:
        query = session.next(now)
        assert query
        session.opened(now)
        phases.append("sendInitialEvents" in query)
        if phases[-1]:
            session.feed(line("BOOKMARK", END), now)
        now += 250.0
        session.ended(now)
        now = max(now, session.next_at)
    assert phases == [True, False, False, True, False, False, True, False]


def test_only_the_marked_bookmark_ends_a_snapshot() -> None:
    session = new_session()
    session.next(0.0)
    session.opened(0.1)
    part = {"metadata": {"name": "s", "resourceVersion": "7"}}
    assert not session.feed(line("ADDED", part), 0.2)
    assert not session.feed(line("BOOKMARK", {"metadata": {"resourceVersion": "8"}}), 0.2)
    assert session.slices is None
    assert session.feed(line("BOOKMARK", END), 0.3)
    assert set(session.slices or ()) == {"s"}


def test_a_snapshot_that_broke_off_leaves_nothing_behind() -> None:
    session = new_session()
    session.next(0.0)
    session.opened(0.1)
    session.feed(line("ADDED", {"metadata": {"name": "deleted meanwhile"}}), 0.2)
    session.failed(Failure.BROKEN_OFF, "", 0.3)
    session.next(10.0)
    session.opened(10.1)
    assert session.feed(line("BOOKMARK", END), 10.2)
    assert session.slices == {}


def test_after_a_long_outage_an_expired_version_costs_two_short_pauses() -> None:
    session = new_session()
    session.next(0.0)
    session.opened(0.0)
    session.feed(line("BOOKMARK", END), 0.0)
    session.failed(Failure.BROKEN_OFF, "", 0.1)
    while session.next_at < 300.0:
        now = session.next_at
        session.next(now)
        session.failed(Failure.UNREACHABLE, "", now)
    now = session.next_at
    session.next(now)
    session.refused(410, b"", None, now)
    assert session.next_at < now + 2.5
