"""The API server of the tests says what a real one said, event by event."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.apiserver.server import ApiServer
from tests.apiserver.store import ADAPTERS, LEASES, SLICES, Refusal, Store, selects

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.apiserver.store import Resource

RECORDINGS = Path(__file__).parents[1] / "data" / "k8s"
PATH = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
TANDEM = "rbg.workloads.x-k8s.io/group-name=tandem"
WAIT_S = 10.0


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / name).read_text())


async def lines(response: httpx.Response) -> AsyncIterator[dict]:
    async for text in response.aiter_lines():
        yield json.loads(text)


def put(store: Store, content: dict) -> None:
    """A slice, at the version that it had."""
    put_as(store, SLICES, {k: v for k, v in content.items() if k not in ("kind", "apiVersion")})


def put_as(store: Store, resource: Resource, content: dict) -> None:
    store.version = int(content["metadata"]["resourceVersion"]) - 1
    store.put(resource, "default", content)


def test_it_replays_the_recorded_watch_event_by_event() -> None:
    first, *story = [
        json.loads(text)
        for text in (RECORDINGS / "endpointslices-watch.jsonl").read_text().splitlines()
    ]

    async def replay() -> None:
        store = Store(1013)
        async with (
            ApiServer(store) as server,
            asyncio.timeout(WAIT_S),
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("GET", PATH, params=first["request"]["params"]) as response,
        ):
            assert response.status_code == first["status"]
            events = lines(response)
            for record in story:
                wanted = record["event"]
                if wanted["type"] != "BOOKMARK":
                    put(store, deepcopy(wanted["object"]))
                    other = {"metadata": {"name": "x", "labels": {"a": "b"}}}
                    store.put(SLICES, "default", other)  # Another group's.
                elif "annotations" not in wanted["object"]["metadata"]:
                    store.version = int(wanted["object"]["metadata"]["resourceVersion"])
                    [watch] = server.watches
                    server._mark(watch)
                assert await anext(events) == wanted

    asyncio.run(replay())


def test_it_lists_as_recorded() -> None:
    wanted = recorded("endpointslices-list.json")

    async def ask() -> None:
        store = Store()
        for item in reversed(wanted["body"]["items"]):
            put(store, deepcopy(item))
        store.version = int(wanted["body"]["metadata"]["resourceVersion"])
        async with ApiServer(store) as server, httpx.AsyncClient(base_url=server.url) as client:
            got = await client.get(PATH, params=wanted["request"]["params"])
            assert (got.status_code, got.json() | {"apiVersion": "discovery.k8s.io/v1"}) == (
                wanted["status"],
                wanted["body"],
            )
            pages, token = [], ""
            while not pages or token:
                query = {"labelSelector": TANDEM, "limit": "2", "continue": token}
                page = (await client.get(PATH, params=query)).json()
                pages.append(page["items"])
                token = page["metadata"].get("continue", "")
            assert [len(page) for page in pages] == [2, 1]
            assert [item for page in pages for item in page] == wanted["body"]["items"]

    asyncio.run(ask())


def test_it_refuses_as_recorded() -> None:
    async def ask() -> None:
        store = Store()
        store.compacted = 561
        async with ApiServer(store) as server, httpx.AsyncClient(base_url=server.url) as client:
            wanted = recorded("watch-expired-410.json")
            got = await client.get(PATH, params=wanted["request"]["params"])
            assert got.status_code == wanted["status"]
            assert [json.loads(text) for text in got.text.splitlines()] == wanted["events"]
            server.tokens = {"good"}
            got = await client.get(PATH, headers={"Authorization": "Bearer bad"})
            wanted = recorded("unauthorized-401.json")
            assert (got.status_code, got.json()) == (wanted["status"], wanted["body"])

    asyncio.run(ask())


def test_leases_conflict_as_recorded() -> None:
    async def ask() -> None:
        async with ApiServer() as server, httpx.AsyncClient(base_url=server.url) as client:
            for name in ("lease-create", "lease-create-again-409", "lease-put"):
                await compare(server.store, client, recorded(f"{name}.json"))
            await compare(server.store, client, recorded("lease-put-stale-409.json"))

    async def compare(store: Store, client: httpx.AsyncClient, wanted: dict) -> None:
        request, body = wanted["request"], wanted["body"]
        if version := body["metadata"].get("resourceVersion"):
            store.version = int(version) - 1
        got = await client.request(request["method"], request["path"], json=request["body"])
        content = got.json()
        # A name for life and a birthday are the real server's to give.
        for given in ("uid", "creationTimestamp"):
            if given in body["metadata"]:
                content["metadata"][given] = body["metadata"][given]
        assert (got.status_code, content) == (wanted["status"], body)

    asyncio.run(ask())


def test_scales_are_read_and_written_as_recorded() -> None:
    adapter = recorded("scalingadapter-get.json")
    path, patch = adapter["request"]["path"], {"Content-Type": "application/merge-patch+json"}

    async def ask() -> None:
        store = Store()
        put_as(store, ADAPTERS, deepcopy(adapter["body"]))
        async with ApiServer(store) as server, httpx.AsyncClient(base_url=server.url) as client:
            got = await client.get(path)
            assert (got.status_code, got.json()) == (adapter["status"], adapter["body"])
            await compare(store, client, recorded("scale-get.json"))
            await compare(store, client, recorded("scale-patch.json"))
            got = await client.patch(
                f"{path}/status", json={"status": {"replicas": 3}}, headers=patch
            )
            assert got.json()["status"]["replicas"] == 3
            await compare(store, client, recorded("scale-patch-down.json"))
            content = {"spec": {"replicas": 9}}
            assert (await client.patch(f"{path}/scale", json=content)).status_code == 415
            stale = content | {"metadata": {"resourceVersion": "1"}}
            assert (
                await client.patch(f"{path}/scale", json=stale, headers=patch)
            ).status_code == 409
            assert (await client.get(f"{path}/other")).status_code == 404

    async def compare(store: Store, client: httpx.AsyncClient, wanted: dict) -> None:
        request, headers = wanted["request"], patch if wanted["request"]["body"] else {}
        if request["body"]:
            store.version = int(wanted["body"]["metadata"]["resourceVersion"]) - 1
        got = await client.request(
            request["method"], request["path"], json=request["body"], headers=headers
        )
        assert (got.status_code, got.json()) == (wanted["status"], wanted["body"])

    asyncio.run(ask())


def test_it_forbids_as_recorded() -> None:
    wanted = recorded("forbidden-403.json")

    async def ask() -> None:
        async with ApiServer() as server, httpx.AsyncClient(base_url=server.url) as client:
            server.forbidden = {("list", "endpointslices"), ("patch", ADAPTERS.plural + "/scale")}
            got = await client.get(wanted["request"]["path"])
            assert (got.status_code, got.json()) == (wanted["status"], wanted["body"])
            server.store.put(
                ADAPTERS, "default", {"metadata": {"name": "a"}, "spec": {"replicas": 1}}
            )
            path = "/apis/workloads.x-k8s.io/v1alpha2/namespaces/default/" + ADAPTERS.plural
            headers = {"Content-Type": "application/merge-patch+json"}
            assert (await client.get(f"{path}/a/scale")).status_code == 200
            got = await client.patch(f"{path}/a/scale", json={}, headers=headers)
            assert got.status_code == 403
            assert server.store.get(ADAPTERS, "default", "a")["spec"]["replicas"] == 1

    asyncio.run(ask())


def test_labels_are_selected_as_kubernetes_does() -> None:
    labels = {"a": "b", "c": ""}
    for selector in ("", "a=b", "a==b", "a=b,c", "a!=c", "x!=y", "!x", "c="):
        assert selects(selector, labels), selector
    for selector in ("a=c", "a!=b", "x", "!a", "a=b,x", "x=y"):
        assert not selects(selector, labels), selector


def test_what_no_longer_matches_is_deleted_for_the_watch() -> None:
    from tests.apiserver.store import Watcher

    store = Store()
    store.put(SLICES, "default", {"metadata": {"name": "s", "labels": {"a": "b"}}})
    watcher = Watcher(store, SLICES, "default", {"labelSelector": "a=b"})
    store.put(SLICES, "default", {"metadata": {"name": "s", "labels": {"a": "c"}}})
    store.put(SLICES, "other", {"metadata": {"name": "s", "labels": {"a": "b"}}})
    store.put(LEASES, "default", {"metadata": {"name": "s", "labels": {"a": "b"}}})
    said = [json.loads(text) for text in watcher.lines()]
    assert [event["type"] for event in said] == ["ADDED", "DELETED"]
    assert said[1]["object"]["metadata"]["resourceVersion"] == str(store.version - 2)


def test_a_page_of_a_forgotten_list_is_refused() -> None:
    store = Store()
    for name in "abc":
        store.put(SLICES, "default", {"metadata": {"name": name}})
    token = store.page(SLICES, "default", {"limit": "1"})["metadata"]["continue"]
    store.compact()
    with pytest.raises(Refusal) as refused:
        store.page(SLICES, "default", {"limit": "1", "continue": token})
    assert refused.value.code == 410
