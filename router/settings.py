"""What a router's process can be told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from controller.flags import Names, Ports, Roles, Url, split
from router.ask import Reserve
from router.core.placement import Disaggregate
from workers.api import MESSAGE_BYTES_MAX
from workers.flags import FileToWrite, MessageBytes, Port, Seconds, Text

_ADDRESS: Final = re.compile(r"tcp://[A-Za-z0-9._-]+:([0-9]{1,5})")


def _address(value: str) -> str:
    found = _ADDRESS.fullmatch(value)
    if not found or not 0 < int(found[1]) <= 65535:
        raise ValueError("want tcp://host:port")
    return value


def _distinct(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(addresses)) < len(addresses):
        raise ValueError("an address is there twice")
    return addresses


Addresses = Annotated[
    # Not decoded: it is no JSON, neither as a flag nor as a variable.
    tuple[Annotated[str, AfterValidator(_address)], ...],
    NoDecode,
    BeforeValidator(split),
    AfterValidator(_distinct),
    Field(min_length=1),
]


def _shares(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    shares: dict[str, float] = {}
    for part in split(value):
        name, _, share = part.rpartition("=")
        if not name or name in shares or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", share):
            raise ValueError("want name=share, each name once, with commas between")
        if not float(share):
            raise ValueError(f"the share of {name} is not above zero")
        shares[name] = float(share)
    return shares


Count = Annotated[int, Field(gt=0)]
Shares = Annotated[Mapping[str, float], NoDecode, BeforeValidator(_shares)]


def _priorities(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found: dict[str, int] = {}
    for part in split(value):
        name, _, priority = part.rpartition("=")
        if not name or name in found or not re.fullmatch(r"-?[0-9]{1,9}", priority):
            raise ValueError("want name=priority, each name once, with commas between")
        found[name] = int(priority)
    return found


Priorities = Annotated[Mapping[str, int], NoDecode, BeforeValidator(_priorities)]


class Discover(StrEnum):
    """Where workers are learnt from while the router runs."""

    KUBERNETES = "kubernetes"
    DNS = "dns"
    FILE = "file"


class RouterSettings(BaseSettings):
    """Built once, in `__main__`; docs/settings.md has them all."""

    model_config = SettingsConfigDict(env_prefix="ROUTER_", frozen=True, extra="forbid")

    model: Text = Field(description="the workers' own")
    workers: Addresses | None = Field(
        None, description="token channels, tcp://host:port, with commas between"
    )
    host: Text = Field("127.0.0.1", description="address that it listens at")
    port: Port = Field(8000, description="HTTP; 0 takes a free one")
    address_file: FileToWrite | None = Field(
        None, description="where its address is written once the socket is bound"
    )
    notice_s: float = Field(
        0, ge=0, le=3600, description="how long SIGTERM lets it take requests, not ready"
    )
    drain_s: Seconds = Field(30, description="how long it then waits for what streams, in seconds")
    reserve: Reserve = Field(
        Reserve.AT_LAST_STEP, description="when the decode worker sets blocks aside for a prompt"
    )
    disaggregate: Disaggregate = Field(
        Disaggregate.BY_ESTIMATE, description="when another worker computes the prompt"
    )
    queue_max: int = Field(10_000, gt=0, description="most requests that wait for room")
    queue_s: Seconds = Field(300, description="longest that one waits")
    prefill_queue_s: Seconds = Field(
        30, description="seconds of prompts queued on a worker that gets no more"
    )
    ttft_objective_s: float | None = Field(
        None, gt=0, description="what can't have its first token by then is refused"
    )
    itl_objective_s: float | None = Field(
        None,
        gt=0,
        description="mean time between a stream's tokens: counted, and what sizing holds",
    )
    tenant_tokens_per_s: float | None = Field(
        None, gt=0, description="most prompt and output tokens of one tenant"
    )
    tenant_burst_s: Seconds = Field(10, description="seconds of that rate which may come at once")
    tenant_shares: Shares | None = Field(
        None, description="of the queue, name=share with commas between; others 1"
    )
    hedge_after_s: Seconds = Field(
        2, description="how late a first token is, beside its estimate, before a second try"
    )
    hedge_ratio: float = Field(
        0.05, ge=0, le=1, description="most such second tries, as a share of requests"
    )
    body_bytes_max: Count = Field(4 * 1024 * 1024, description="most bytes of a request's body")
    bodies_bytes_max: Count = Field(
        256 * 1024 * 1024, description="most bytes of the bodies of all requests under way"
    )
    body_s: Seconds = Field(30, description="longest that a body may take to come in")
    header_bytes_max: Count = Field(32_768, description="most bytes of a request's headers")
    headers_max: Count = Field(100, description="most headers of a request")
    header_s: Seconds = Field(10, description="longest that they may take to come in")
    connections_max: Count = Field(4_096, description="most connections of clients at once")
    idle_s: Seconds = Field(75, description="how long a connection is kept without a request")
    unread_s: Seconds = Field(30, description="longest that a client may leave answers unread")
    json_depth_max: Count = Field(64, description="deepest nesting of a body")
    json_values_max: Count = Field(20_000, description="most values in a body, but token ids")
    entries_max: Count = Field(3_000, description="most entries of a list or object in a body")
    token_ids_max: Count = Field(131_072, description="most token ids in a body")
    text_chars_max: Count = Field(600_000, description="most characters of text in a body")
    prompts_max: Count = Field(128, description="most prompts, or conversations, in a request")
    sequences_max: Count = Field(128, description="most sequences of a request: prompts times n")
    messages_max: Count = Field(
        3_000, description="most messages in a request, and parts of them together"
    )
    input_items_max: Count = Field(256, description="most items in the input of /v1/responses")
    tools_max: Count = Field(256, description="most tools of a request")
    stops_max: Count = Field(32, description="most stop strings of a request")
    stop_chars_max: Count = Field(256, description="longest stop string, or bad word")
    bad_words_max: Count = Field(256, description="most bad words of a request")
    logit_bias_max: Count = Field(
        1_024, description="most entries of logit_bias, and of lists of token ids like it"
    )
    grammar_bytes_max: Count = Field(65_536, description="largest grammar, schema or expression")
    grammar_s: Seconds = Field(5, description="longest that one may take to be checked")
    preparing_max: Count = Field(1_024, description="most prompts that wait to be tokenized")
    message_bytes_max: MessageBytes = Field(
        MESSAGE_BYTES_MAX, description="largest message of the token channel; as the workers'"
    )
    tenant_priorities: Priorities | None = Field(
        None,
        description="the most urgent that each may ask for, name=priority with commas between, "
        "* for all others; else 0",
    )
    trust_tenant_header: bool = Field(
        False, description="whoever has a key may say by X-Tandem-Tenant whose a request is"
    )
    admin_port: Port | None = Field(
        None, description="serves /metrics and /tandem/… there, and no longer beside the API"
    )
    admin_key_file: Path | None = Field(
        None, description="the key for /metrics and /tandem/…, in one line"
    )
    api_docs: bool = Field(False, description="serves /docs, /redoc and /openapi.json")
    curve_secret_file: Path | None = Field(
        None, description="its own secret key: encrypts the token channel"
    )
    curve_workers_file: Path | None = Field(None, description="the workers' public key")
    discover: Discover | None = Field(None, description="where further workers are learnt from")
    discover_ports: Ports | None = Field(
        None, description="token channels' ports, role=port with commas between; no other roles"
    )
    discover_selector: Text | None = Field(None, description="of EndpointSlices, by their labels")
    discover_role_label: Text = Field(
        "rbg.workloads.x-k8s.io/role-name", description="their label that has the role"
    )
    discover_leaders: Roles | None = Field(
        None, description="leader-worker roles, of which only the leaders are workers to us"
    )
    discover_namespace: Text | None = Field(None, description="theirs; else the pod's own")
    discover_api: Url | None = Field(
        None, description="API server; else the one that a pod is told of"
    )
    discover_token_file: Path | None = Field(None, description="else the service account's")
    discover_ca_file: Path | None = Field(None, description="else the service account's")
    discover_names: Names | None = Field(
        None, description="headless services, role=name with commas between"
    )
    discover_file: Path | None = Field(None, description="of workers, one a line")
    discover_debounce_s: Seconds = Field(
        1, description="so long a ready worker may seem to be out of service"
    )

    @model_validator(mode="after")
    def _both_keys_or_none(self) -> Self:
        if (self.curve_secret_file is None) != (self.curve_workers_file is None):
            raise ValueError("--curve-secret-file and --curve-workers-file go together")
        return self

    @model_validator(mode="after")
    def _some_workers(self) -> Self:
        if self.workers is None and self.discover is None:
            raise ValueError("needs --workers or ROUTER_WORKERS, or --discover or ROUTER_DISCOVER")
        needs = {
            Discover.KUBERNETES: ("discover_selector", "discover_ports"),
            Discover.DNS: ("discover_names", "discover_ports"),
            Discover.FILE: ("discover_file",),
        }
        for name in needs.get(self.discover, ()) if self.discover else ():
            if getattr(self, name) is None:
                raise ValueError(f"--discover {self.discover} needs --{name.replace('_', '-')}")
        if self.discover is Discover.DNS:
            ports, names = self.discover_ports or {}, self.discover_names or {}
            if missing := names.keys() - ports.keys():
                raise ValueError(f"--discover-ports lacks {', '.join(sorted(missing))}")
        return self
