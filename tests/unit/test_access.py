"""Keys, routes and tenants: who may ask for what, and whose a request is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from router.asker import ADMIN, AccessRules, Asker, HeaderBad
from router.core.access import (
    ROUTES,
    Access,
    Keys,
    Presented,
    find_route,
    presented_keys,
    salt_for,
    tenant_of,
)
from router.core.errors import AdminKeyNeeded, KeyNotKnown, TenantNotAllowed
from router.keys import read_admin_key
from workers.keys import KeyFileBad

if TYPE_CHECKING:
    from pathlib import Path

CLIENT_KEY, OTHER_KEY, ADMIN_KEY = "client-key", "other-key", "admin-key"
KEYS = Keys([CLIENT_KEY, OTHER_KEY], ADMIN_KEY)
OPEN = {"/health", "/livez", "/readyz", "/ping"}


def identify(
    rules: AccessRules,
    access: Access = Access.CLIENT,
    *,
    at_admin: bool = False,
    **headers: str,
) -> Asker:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return rules.identify(Headers(named), access, at_admin=at_admin)


def test_only_probes_are_open() -> None:
    assert {route.path for route in ROUTES if route.access is Access.OPEN} == OPEN


@pytest.mark.parametrize(
    "path",
    [
        "/invocations", "/generative_scoring", "/scale_elastic_ep", "/is_scaling_elastic_ep",
        "/load",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests",
        "/metrics/x", "/metricsx", "/v1/models/", "//v1/models", "/tandem/requests/", "/tandem",
        "/tandem/requests/a/b", "/v1/responses/a/b", "/static/x", "", "/",
    ],
)  # fmt: skip
def test_a_path_that_is_not_listed_has_no_route(path: str) -> None:
    assert find_route(path) is None


def test_a_listed_path_has_its_route() -> None:
    for route in ROUTES:
        assert find_route(route.path.replace("{", "").replace("}", "")) is route


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {CLIENT_KEY}"}, {"authorization": f"bearer  {CLIENT_KEY} "},
     {"x_api_key": CLIENT_KEY}, {"api_key": CLIENT_KEY},
     {"authorization": "Bearer wrong", "x_api_key": CLIENT_KEY}],
)  # fmt: skip
def test_a_key_is_taken_from_any_header_that_clients_use(headers: dict[str, str]) -> None:
    found = identify(AccessRules(KEYS), **headers)
    assert found == Asker(tenant_of(CLIENT_KEY), None, admin=False, salted=True)


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": CLIENT_KEY},
     {"authorization": f"Basic {CLIENT_KEY}"}, {"x_api_key": CLIENT_KEY[:-1]}, {"api_key": ""},
     {"x_api_key": "k\udce9y"}],
)  # fmt: skip
def test_a_request_without_a_known_key_is_refused_where_keys_are_set(
    headers: dict[str, str],
) -> None:
    rules = AccessRules(KEYS)
    for access in (Access.CLIENT, Access.ADMIN):
        with pytest.raises(KeyNotKnown):
            rules.identify(
                {name.replace("_", "-"): value for name, value in headers.items()},
                access,
                at_admin=False,
            )


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=30), max_size=4))
def test_a_key_is_known_exactly_when_it_is_one_of_the_clients(key: str, clients: list[str]) -> None:
    assert (Keys(clients).judge(key) is Presented.CLIENT) == (key in clients)


def test_keys_keep_no_key() -> None:
    assert CLIENT_KEY not in repr(vars(Keys([CLIENT_KEY], ADMIN_KEY)))
    assert CLIENT_KEY not in tenant_of(CLIENT_KEY)


def test_admin_routes_need_the_admin_key_where_a_client_key_is_set() -> None:
    rules = AccessRules(KEYS)
    with pytest.raises(AdminKeyNeeded, match="not a client's"):
        identify(rules, Access.ADMIN, x_api_key=CLIENT_KEY)
    assert identify(rules, Access.ADMIN, x_api_key=ADMIN_KEY).admin
    with pytest.raises(AdminKeyNeeded, match="--admin-key-file"):
        identify(AccessRules(Keys([CLIENT_KEY])), Access.ADMIN, x_api_key=CLIENT_KEY)


def test_admin_routes_are_open_without_any_key() -> None:
    assert identify(AccessRules(), Access.ADMIN).admin


def test_admin_key_alone_guards_admin_routes_only() -> None:
    rules = AccessRules(Keys(admin=ADMIN_KEY))
    with pytest.raises(KeyNotKnown):
        identify(rules, Access.ADMIN)
    assert identify(rules) == Asker("", None, admin=False)


def test_admin_address_needs_no_key_unless_there_is_an_admin_key() -> None:
    open_there = AccessRules(Keys([CLIENT_KEY]), admin_address=True)
    assert identify(open_there, Access.ADMIN, at_admin=True).admin
    assert identify(open_there, Access.CLIENT, at_admin=True).admin
    guarded = AccessRules(KEYS, admin_address=True)
    for access in (Access.CLIENT, Access.ADMIN):
        with pytest.raises(KeyNotKnown):
            identify(guarded, access, at_admin=True)
        with pytest.raises(AdminKeyNeeded):
            identify(guarded, access, at_admin=True, x_api_key=CLIENT_KEY)
        assert identify(guarded, access, at_admin=True, x_api_key=ADMIN_KEY).admin


def test_client_can_t_name_its_tenant_unless_the_header_is_trusted() -> None:
    with pytest.raises(TenantNotAllowed):
        identify(AccessRules(KEYS), x_api_key=CLIENT_KEY, x_tandem_tenant="other")
    trusting = AccessRules(KEYS, trust_tenant_header=True)
    found = identify(trusting, x_api_key=CLIENT_KEY, x_tandem_tenant="other")
    assert found == Asker("other", None, admin=False, salted=True)


def test_admin_key_may_name_any_tenant() -> None:
    assert identify(AccessRules(KEYS), x_api_key=ADMIN_KEY, x_tandem_tenant="b").tenant == "b"
    assert identify(AccessRules(KEYS), x_api_key=ADMIN_KEY).tenant == ADMIN


def test_a_made_up_key_makes_no_tenant_without_keys() -> None:
    assert identify(AccessRules(), x_api_key="made-up") == Asker()
    assert identify(AccessRules(), x_api_key="made-up", x_tandem_tenant="a") == Asker("a")


def test_a_header_of_ours_with_a_bad_value_is_refused() -> None:
    assert identify(AccessRules(), x_tandem_ttft_s="1.5").ttft_s == 1.5
    for name, value in (("x_tandem_ttft_s", "soon"), ("x_tandem_ttft_s", "-1")):
        with pytest.raises(HeaderBad):
            identify(AccessRules(), **{name: value})
    with pytest.raises(HeaderBad):
        identify(AccessRules(), x_tandem_tenant="")


@given(
    st.tuples(st.text(max_size=9), st.none() | st.text(min_size=1, max_size=9)),
    st.tuples(st.text(max_size=9), st.none() | st.text(min_size=1, max_size=9)),
)
def test_salts_are_equal_only_for_one_tenant_s_equal_salts(
    one: tuple[str, str | None], other: tuple[str, str | None]
) -> None:
    assert (salt_for(*one) == salt_for(*other)) == (one == other)


def test_presented_keys_leave_out_what_is_empty() -> None:
    assert presented_keys({"authorization": "Bearer ", "x-api-key": "", "api-key": "k"}) == ["k"]


def test_admin_key_file_is_refused_when_anybody_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "admin"
    file.write_text("a-key-of-the-admin\n")
    file.chmod(0o440)
    assert read_admin_key(file) == "a-key-of-the-admin"
    file.chmod(0o444)
    with pytest.raises(KeyFileBad, match="open to all"):
        read_admin_key(file)


@pytest.mark.parametrize(
    "content", ["", "short", "two words of a key", "two-lines-of\na-file-here"]
)
def test_admin_key_file_with_no_usable_key_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "admin"
    file.write_text(content)
    file.chmod(0o400)
    with pytest.raises(KeyFileBad):
        read_admin_key(file)
