"""Who is a peer, by slices as a real API server sent them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.peers import Kind, Membership, Peer, RoleFacts, Sighting, sightings
from controller.core.slices import Slice, merge

RECORDINGS = Path(__file__).parents[1] / "data" / "k8s"
ROLE = "rbg.workloads.x-k8s.io/role-name"
ROLES = {role: RoleFacts(7000) for role in ("router", "prefill", "decode")}


def replay() -> list[tuple[float, str, str, str]]:
    """Time, kind, name and the pod's uid of every change in the recorded watch."""
    slices: dict[str, Slice] = {}
    membership = Membership()
    story = []
    _, *lines = (RECORDINGS / "endpointslices-watch.jsonl").read_text().splitlines()

    def pass_time(to: float) -> None:
        while (due := membership.due_at) is not None and due <= to:
            tell(due, membership.tick(due))

    def tell(at: float, changes: list) -> None:
        story.extend(
            (round(at, 2), c.kind.value, c.peer.name.removeprefix("tandem-"), c.peer.uid[:8])
            for c in changes
        )

    for line in lines:
        record = json.loads(line)
        pass_time(record["t"])
        event = record["event"]
        if event["type"] == "BOOKMARK":
            continue
        part = msgspec.convert(event["object"], Slice)
        slices[part.metadata.name] = part
        found = sightings(merge(slices.values(), ROLE), ROLES)
        tell(record["t"], membership.observe(found, record["t"]))
    pass_time(200.0)
    return story


def test_the_recorded_group_is_seen_as_it_was() -> None:
    d0, d1, p0, p1 = "88bbfca5", "7b147ae0", "df0ee260", "b8dedf2b"
    assert replay() == [
        (3.25, "joined", "decode-0", d0),
        (3.25, "joined", "decode-1", d1),
        (3.25, "joined", "prefill-0", p0),
        (3.26, "joined", "prefill-1", p1),
        (3.26, "joined", "router-0", "39fcf192"),
        # 2+2 and the router ready by 4.9 s.
        (4.8, "ready", "decode-0", d0),
        (4.81, "ready", "decode-1", d1),
        (4.83, "ready", "prefill-0", p0),
        (4.86, "ready", "prefill-1", p1),
        (4.87, "ready", "router-0", "39fcf192"),
        (23.01, "joined", "prefill-2", "22454088"),
        (24.55, "ready", "prefill-2", "22454088"),
        (34.22, "draining", "prefill-2", "22454088"),
        (34.23, "draining", "prefill-1", p1),
        (39.17, "gone", "prefill-1", p1),
        (39.18, "gone", "prefill-2", "22454088"),
        # 45.83 to 46.29: everybody flaps, and nothing is said.
        (49.29, "draining", "decode-1", d1),
        (56.4, "ready", "decode-1", d1),
        (57.43, "draining", "decode-0", d0),
        (64.98, "ready", "decode-0", d0),
        (74.31, "draining", "decode-0", d0),
        (79.1, "gone", "decode-0", d0),
        (80.12, "joined", "decode-0", "7fd7bfd9"),
        (81.64, "ready", "decode-0", "7fd7bfd9"),
    ]


def test_the_recorded_list_says_what_the_watch_says_at_its_end() -> None:
    body = json.loads((RECORDINGS / "endpointslices-list.json").read_text())["body"]
    found = merge(msgspec.convert(body["items"], list[Slice]), ROLE)
    names = ["tandem-decode-0", "tandem-decode-1", "tandem-prefill-0", "tandem-router-0"]
    assert [e.name for e in found] == names
    assert found[0].uid.startswith("7fd7bfd9")


# ---------------------------------------------------------------- merging


def endpoint(uid: str, ip: str = "10.0.0.1", name: str = "g-decode-0", **conditions: bool) -> dict:
    return {
        "addresses": [ip],
        "hostname": name,
        "conditions": conditions,
        "targetRef": {"uid": uid, "name": name},
    }


def part(name: str, version: int, *endpoints: dict, family: str = "IPv4") -> Slice:
    meta = {"name": name, "resourceVersion": str(version), "labels": {ROLE: "decode"}}
    return msgspec.convert(
        {"metadata": meta, "addressType": family, "endpoints": list(endpoints)}, Slice
    )


def test_of_two_slices_with_one_pod_the_later_is_believed() -> None:
    old, new = (
        part("a", 9, endpoint("u", serving=True)),
        part("b", 10, endpoint("u", serving=False)),
    )
    for order in ([old, new], [new, old]):
        [merged] = merge(order, ROLE)
        assert not merged.serving


def test_a_pod_that_terminates_in_any_slice_terminates() -> None:
    old = part("a", 9, endpoint("u", serving=True, terminating=True))
    new = part("b", 10, endpoint("u", serving=True, terminating=False))
    [merged] = merge([new, old], ROLE)
    assert merged.terminating


@pytest.mark.parametrize("later", ["IPv4", "IPv6"])
def test_a_pod_with_two_families_is_one_peer_at_its_ipv4_address(later: str) -> None:
    v4 = part("a", 10 if later == "IPv4" else 1, endpoint("u", "10.0.0.1"))
    v6 = part("b", 5, endpoint("u", "fd00::1"), family="IPv6")
    [merged] = merge([v6, v4], ROLE)
    assert merged.address == "10.0.0.1"
    [only] = sightings(merge([v6], ROLE), ROLES)
    assert only.peer.address == "tcp://[fd00::1]:7000"


def test_a_condition_that_is_absent_is_taken_for_good() -> None:
    [merged] = merge([part("a", 1, endpoint("u"))], ROLE)
    assert merged.serving
    assert not merged.terminating


def test_of_a_leader_worker_role_only_leaders_are_peers() -> None:
    slices = [
        part(
            "a",
            1,
            endpoint("u0", "10.0.0.1", "g-decode-0-0"),
            endpoint("u1", "10.0.0.2", "g-decode-0-1"),
            endpoint("u2", "10.0.0.3", "g-decode-10-0"),
            endpoint("u3", "10.0.0.4", "g-decode-1-10"),
        )
    ]
    found = sightings(merge(slices, ROLE), {"decode": RoleFacts(7000, leaders_only=True)})
    assert [s.peer.name for s in found] == ["g-decode-0-0", "g-decode-10-0"]
    assert len(sightings(merge(slices, ROLE), {"decode": RoleFacts(7000)})) == 4
    assert sightings(merge(slices, ROLE), {"prefill": RoleFacts(7000)}) == []


# ---------------------------------------------------------------- membership

PEERS = [Peer(f"u{n}", f"p{n % 2}", "decode", f"tcp://10.0.0.{n}:7000") for n in range(3)]
SEEN = st.dictionaries(
    st.sampled_from(PEERS), st.tuples(st.booleans(), st.booleans()), max_size=3
).map(lambda found: [Sighting(p, *flags) for p, flags in found.items()])


@given(st.lists(st.tuples(SEEN, st.floats(0.01, 3.0)), max_size=12))
def test_what_the_stream_says_is_what_was_seen(history: list) -> None:
    membership, told, now = Membership(), {}, 0.0
    allowed = {
        None: {Kind.JOINED},
        Kind.JOINED: {Kind.READY, Kind.DRAINING, Kind.GONE},
        Kind.READY: {Kind.DRAINING, Kind.GONE},
        Kind.DRAINING: {Kind.READY, Kind.GONE},
    }

    def tell(changes: list) -> None:
        for change in changes:
            assert change.kind in allowed[told.get(change.peer)]
            if change.kind is Kind.GONE:
                del told[change.peer]
            else:
                told[change.peer] = change.kind

    seen: list[Sighting] = []
    for seen, pause_s in history:
        tell(membership.observe(seen, now))
        now += pause_s
        tell(membership.tick(now))
    tell(membership.tick(now + 1.0))
    assert set(told) == {s.peer for s in seen}
    for s in seen:
        assert (told[s.peer] is Kind.READY) == (s.serving and not s.terminating)
    assert membership.due_at is None


def test_a_flap_begins_its_second_anew() -> None:
    """Out for 0.9 s, in for a moment, out for 0.9 s: it never was out for long."""
    membership, [peer, *_] = Membership(), PEERS
    membership.observe([Sighting(peer)], 0.0)
    assert membership.observe([Sighting(peer, serving=False)], 1.0) == []
    assert membership.observe([Sighting(peer)], 1.9) == []
    assert membership.observe([], 2.0) == []
    assert membership.tick(2.9) == []
    assert [c.kind for c in membership.tick(3.0)] == [Kind.GONE]


def test_a_peer_at_another_address_is_another_peer() -> None:
    membership = Membership()
    membership.observe([Sighting(Peer("u", "n", "decode", "tcp://a:1"))], 0.0)
    moved = membership.observe([Sighting(Peer("u", "n", "decode", "tcp://b:1"))], 1.0)
    assert [(c.kind, c.peer.address) for c in moved] == [
        (Kind.GONE, "tcp://a:1"),
        (Kind.JOINED, "tcp://b:1"),
        (Kind.READY, "tcp://b:1"),
    ]
