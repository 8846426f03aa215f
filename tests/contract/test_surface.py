"""A router with keys: which routes it has, who may use them, and what a refusal looks like."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.routing import Route

from router.asker import AccessRules
from router.core.access import ROUTES, Access, tenant_of
from tests.asking import MODEL
from tests.contract.router_rig import (
    ADMIN_KEY,
    CLIENT_KEY,
    ENDPOINTS,
    OTHER_KEY,
    RouterRig,
    body_for,
    error_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

pytestmark = pytest.mark.timeout(300)

REMOVED = [
    ("POST", "/invocations"), ("POST", "/generative_scoring"), ("POST", "/scale_elastic_ep"),
    ("POST", "/is_scaling_elastic_ep"), ("GET", "/load"), ("GET", "/kv_event_sources"),
    ("POST", "/v1/systemone"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/inference/v1/abort_requests"), ("POST", "/v1/chat/completions/batch"),
    ("GET", "/metrics/"), ("GET", "/metricsx"), ("GET", "/docs/oauth2-redirect"),
    ("POST", "/v1/chat/completions/derender"), ("GET", "/openapi.json"), ("GET", "/docs"),
    ("GET", "/redoc"), ("POST", "/inference/v1/generate"), ("GET", "/nothing"),
]  # fmt: skip
BAD_SCHEMA = {"type": "nonsense"}
BAD_GRAMMARS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"structured_outputs": {"grammar": "root ::= ((("}},
    "/v1/completions": {"structured_outputs": {"regex": "((("}},
    "/v1/responses": {
        "text": {"format": {"type": "json_schema", "name": "a", "schema": BAD_SCHEMA}}
    },
    "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": BAD_SCHEMA}}},
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterRig]:
    folder = tmp_path_factory.mktemp("surface")
    admin = folder / "admin"
    admin.write_text(ADMIN_KEY)
    admin.chmod(0o400)
    flags = ["--api-key", CLIENT_KEY, OTHER_KEY, "--admin-key-file", str(admin)]
    # One token over the rate, and a tenant that is named so waits for an hour.
    flags += [
        "--tenant-tokens-per-s",
        "1000000",
        "--tenant-priorities",
        f"{tenant_of(OTHER_KEY)}=-5",
    ]
    with RouterRig(folder, *flags) as running:
        yield running


# ------------------------------------------------------------ routes and keys


def path_of(route: Any) -> str:
    return str(route.path)


@pytest.mark.parametrize(("method", "path"), REMOVED, ids=[path for _, path in REMOVED])
def test_route_that_is_not_served_is_not_found_with_or_without_a_key(
    rig: RouterRig, method: str, path: str
) -> None:
    for key in (None, CLIENT_KEY, ADMIN_KEY):
        with rig.client(key) as client:
            answer = client.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == 404, answer.text
        assert set(error_of(answer)) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "route", [r for r in ROUTES if r.access is not Access.OPEN and not r.optional], ids=path_of
)
def test_route_that_is_not_open_needs_a_key(rig: RouterRig, route: Any) -> None:
    path = route.path.replace("{", "").replace("}", "")
    for method in route.methods:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
            with rig.client(None, **headers) as client:
                answer = client.request(method, path, content=b"{}")
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["type"] == "invalid_api_key"


@pytest.mark.parametrize("route", [r for r in ROUTES if r.access is Access.OPEN], ids=path_of)
def test_probe_needs_no_key(rig: RouterRig, route: Any) -> None:
    with rig.client() as client:
        assert {client.request(m, route.path).status_code for m in route.methods} == {200}


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {CLIENT_KEY}"}, {"x-api-key": CLIENT_KEY}, {"api-key": CLIENT_KEY}],
    ids=lambda headers: next(iter(headers)),
)
@pytest.mark.parametrize("path", ENDPOINTS)
def test_each_endpoint_takes_a_key_in_any_header(
    rig: RouterRig, path: str, headers: dict[str, str]
) -> None:
    with rig.client(None, **headers) as client:
        assert client.post(path, json=body_for(path)).status_code == 200


def test_metrics_and_workers_are_the_admin_s_and_tell_no_secrets(rig: RouterRig) -> None:
    for path in ("/metrics", "/tandem/workers"):
        with rig.client(CLIENT_KEY) as client:
            refused = client.get(path)
        assert (refused.status_code, error_of(refused)["code"]) == (403, "admin_key_needed")
    with rig.client(ADMIN_KEY) as admin:
        assert "tandem_router_" in admin.get("/metrics").text
        (worker,) = admin.get("/tandem/workers").json()["workers"]
    assert worker["hello"]["worker_id"] == "mixed-1"
    assert not {"epoch", "handoff_endpoint"} & set(worker["hello"])


def test_browser_may_ask_without_a_key_what_it_may_send(rig: RouterRig) -> None:
    asked = {"origin": "http://example.com", "access-control-request-method": "POST"}
    with rig.client(None, **asked) as client:
        assert client.options("/v1/chat/completions").status_code not in (401, 404, 405)


# ------------------------------------------------------------ what is mounted


def mounted(*flags: str, docs: bool = False) -> FastAPI:
    """The application with vLLM's routes and ours, over nothing."""
    from vllm.entrypoints.launchers.app import build_app

    from router.front import Surface, View, front_args, mount

    args = front_args(str(Path(__file__).parent), list(flags))  # A name would be looked for.
    app: FastAPI = build_app(args, ("generate",), None)
    app.middleware_stack = None  # As in `build_front`: it is built with the first request.
    unused: Any = None
    mount(app, View(unused, unused, unused), args, Surface(AccessRules(), docs))
    return app


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Torch's, while vLLM imports it.
@pytest.mark.parametrize("everything", [False, True])
def test_application_has_the_listed_routes_and_no_others(everything: bool) -> None:
    app = mounted("--enable-scale-out", docs=True) if everything else mounted()
    methods: dict[str, set[str]] = {}
    for route in app.routes:
        assert isinstance(route, Route), f"{route} serves whatever is below it"
        methods.setdefault(route.path, set()).update((route.methods or set()) - {"HEAD"})
    assert methods == {r.path: set(r.methods) for r in ROUTES if everything or not r.optional}


# ------------------------------------------------------------ tenants


def test_record_is_found_by_its_own_tenant_and_the_admin_only(rig: RouterRig) -> None:
    name = uuid.uuid4().hex
    with rig.client(CLIENT_KEY) as client:
        body = body_for("/v1/completions")
        answer = client.post("/v1/completions", json=body, headers={"X-Request-Id": name}).json()
        chat = client.post("/v1/chat/completions", json=body_for("/v1/chat/completions")).json()
        response = client.post("/v1/responses", json=body_for("/v1/responses")).json()
    names = [name, answer["id"], chat["id"], response["id"]]
    for key, status in ((CLIENT_KEY, 200), (ADMIN_KEY, 200), (OTHER_KEY, 404)):
        with rig.client(key) as client:
            found = [client.get(f"/tandem/requests/{each}") for each in names]
        assert [each.status_code for each in found] == [status] * 4
        if status == 200:
            assert [len(each.json()) for each in found] == [1] * 4


def test_part_of_an_id_finds_no_record(rig: RouterRig) -> None:
    name = uuid.uuid4().hex
    with rig.client(ADMIN_KEY) as client:
        body = body_for("/v1/completions")
        client.post("/v1/completions", json=body, headers={"X-Request-Id": name})
        for part in ("0", name[:-1], name[1:], f"cmpl-{name[:-1]}", f"{name}-", "cmpl"):
            assert client.get(f"/tandem/requests/{part}").status_code == 404


def test_client_that_names_a_tenant_is_refused(rig: RouterRig) -> None:
    with rig.client(CLIENT_KEY, **{"X-Tandem-Tenant": "other"}) as client:
        answer = client.post("/v1/completions", json=body_for("/v1/completions"))
    assert (answer.status_code, error_of(answer)["code"]) == (403, "tenant_not_allowed")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_priority_is_bounded_by_the_tenant_s_setting(rig: RouterRig, stream: bool) -> None:
    for key, priority, status in (
        (CLIENT_KEY, -1, 400), (CLIENT_KEY, 7, 200), (OTHER_KEY, -5, 200), (OTHER_KEY, -6, 400),
    ):  # fmt: skip
        with rig.client(key) as client:
            body = body_for("/v1/chat/completions", priority=priority, stream=stream)
            answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert "--tenant-priorities" in error_of(answer)["message"]


def test_cached_prompts_are_shared_within_a_tenant_only(rig: RouterRig) -> None:
    prompt = f"{uuid.uuid4()} " * 30

    def cached(key: str, **fields: Any) -> tuple[int, int]:
        """Tokens that the worker had, and that the router's index expected it to have."""
        with rig.client(key) as client:
            body = body_for("/v1/completions", prompt=prompt, **fields)
            name = client.post("/v1/completions", json=body).json()["id"]
            (record,) = client.get(f"/tandem/requests/{name}").json()
        return record["cached_tokens"], record["predicted_tokens"]

    assert cached(CLIENT_KEY) == (0, 0)
    assert cached(OTHER_KEY) == (0, 0), "one tenant can tell what another has asked"
    assert cached(CLIENT_KEY, cache_salt="own") == (0, 0)
    for key, fields in ((CLIENT_KEY, {}), (OTHER_KEY, {}), (CLIENT_KEY, {"cache_salt": "own"})):
        had, expected = cached(key, **fields)
        assert had == expected > 0, "worker and router disagree on the salt"


# ------------------------------------------------------------ statuses


@pytest.mark.parametrize("path", BAD_GRAMMARS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_unusable_grammar_is_a_status_code(rig: RouterRig, path: str, stream: bool) -> None:
    with rig.client(CLIENT_KEY) as client:
        answer = client.post(path, json=body_for(path, stream=stream, **BAD_GRAMMARS[path]))
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert error_of(answer)["type"] == "BadRequestError"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_stream_that_is_served_has_its_events(rig: RouterRig, path: str) -> None:
    with rig.client(CLIENT_KEY) as client:
        answer = client.post(path, json=body_for(path, stream=True))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "error" not in answer.text
    last = answer.text.rstrip().split("\n\n")[-1]
    assert "DONE" in last or "response.completed" in last or "message_stop" in last


NO_ROLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"content": "hi"}]},
    "/v1/messages": {"messages": [{"content": "hi"}], "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": [{"content": "hi"}]},
    "/v1/responses": {"input": [{"content": "hi"}]},
    "/tokenize": {"messages": [{"content": "hi"}]},
}


@pytest.mark.parametrize("path", NO_ROLE)
def test_message_without_a_role_is_refused_by_the_field(rig: RouterRig, path: str) -> None:
    with rig.client(CLIENT_KEY) as client:
        answer = client.post(path, json={"model": MODEL, **NO_ROLE[path]})
    assert answer.status_code == 400, answer.text
    assert "role" in answer.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"use_beam_search": True, "n": 2}),
        ("/v1/completions", {"use_beam_search": True, "n": 2}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"logprobs": 2}),
    ],
)
def test_simulated_engine_refuses_what_needs_logprobs(
    rig: RouterRig,
    path: str,
    fields: dict[str, Any],
    stream: bool,
) -> None:
    with rig.client(CLIENT_KEY) as client:
        answer = client.post(path, json=body_for(path, stream=stream, **fields))
    assert answer.status_code == 400, answer.text
    assert "beam search" in error_of(answer)["message"]


# ------------------------------------------------------------ routers of other settings


def test_refused_stream_has_its_status_and_when_to_try_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("over-rate")
    rate = ("--tenant-tokens-per-s", "1", "--tenant-burst-s", "1", "--admin-port", "0")
    with RouterRig(folder, *rate) as rig, rig.client() as client:
        assert client.post("/v1/completions", json=body_for("/v1/completions")).status_code == 200
        for path in ENDPOINTS:
            for stream in (False, True):
                answer = client.post(path, json=body_for(path, stream=stream))
                assert answer.status_code == 429, answer.text
                assert int(answer.headers["retry-after"]) >= 1
                assert error_of(answer)["type"] == "tenant_over_rate"
        # The admin's routes are at their own address, and there without a key.
        assert client.get("/metrics").status_code == 404
        assert client.get("/tandem/workers").status_code == 404
        with httpx.Client(base_url=rig.router.admin, timeout=30) as admin:
            assert "tenant_over_rate" in admin.get("/metrics").text
            assert len(admin.get("/tandem/workers").json()["workers"]) == 1
            assert admin.get("/readyz").status_code == 200
            assert admin.get("/v1/models").status_code == 404


def last_event(answer: httpx.Response) -> dict[str, Any]:
    events = [e for e in answer.text.split("\n\n") if e and e != "data: [DONE]"]
    found: dict[str, Any] = json.loads(events[-1].split("data: ", 1)[1])
    return found


def test_stream_whose_worker_dies_ends_with_the_documented_code(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("lost")
    slow = ("--sim-step-ms", "50")
    with RouterRig(folder, worker_flags=slow) as rig, ThreadPoolExecutor(4) as pool:
        begun = []

        def ask(path: str) -> httpx.Response:
            limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
            body = body_for(path, stream=True, **{limit: 1500})
            with rig.client() as client, client.stream("POST", path, json=body) as answer:
                lines = answer.iter_text()
                text = [next(lines)]
                begun.append(path)
                text += lines
            return httpx.Response(answer.status_code, text="".join(text))

        asked = {path: pool.submit(ask, path) for path in ENDPOINTS}
        rig.router.wait_for(lambda: len(begun) == 4, rig.router.check)
        process = rig.worker.process
        assert process is not None
        process.kill()
        for path, future in asked.items():
            answer = future.result(60)
            assert answer.status_code == 200
            event = last_event(answer)
            if path == "/v1/responses":
                assert (event["type"], event["code"]) == ("error", "worker_lost")
                assert event["sequence_number"] == answer.text.count("event: ") - 1
            else:
                assert event["error"]["type"] == "worker_lost"
