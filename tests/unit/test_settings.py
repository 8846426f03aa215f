"""What a process may be told by flag and by variable, and what stops it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from controller.settings import ControllerSettings
from router.ask import Reserve
from router.core.placement import Disaggregate
from router.settings import Discover, RouterSettings
from workers.api import Role
from workers.flags import flag, read_settings, variable
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic_settings import BaseSettings

TOP = Path(__file__).parents[2]
PROG = "tandem it"

WORKER: dict[str, tuple[str, Any]] = {
    "role": ("decode", Role.DECODE),
    "model": ("some/model", "some/model"),
    "engine": ("sim", "sim"),
    "host": ("10.1.2.3", "10.1.2.3"),
    "port": ("65535", 65535),
    "http_port": ("1", 1),
    "worker_id": ("decode-0.pods", "decode-0.pods"),
    "address_file": ("/address.json", Path("/address.json")),
    "load_s": ("90", 90.0),
    "lease_s": ("0.25", 0.25),
    "drain_s": ("3600", 3600.0),
    "router_silence_s": ("60", 60.0),
    "kv_connector": ("nixl", "nixl"),
    "kv_transports": ("tcp,ucx", "tcp,ucx"),
    "kv_checksums": ("full", "full"),
    "kv_answer_s": ("2", 2.0),
    "kv_read_s": ("9.5", 9.5),
    "message_bytes_max": ("67108864", 67108864),
    "curve_secret_file": ("a", Path("a")),
    "curve_routers_file": ("b", Path("b")),
}
ROUTER: dict[str, tuple[str, Any]] = {
    "model": ("m", "m"),
    "workers": ("tcp://a:1,tcp://b-0.c:65535,", ("tcp://a:1", "tcp://b-0.c:65535")),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "address_file": ("/address.json", Path("/address.json")),
    "message_bytes_max": ("1048576", 1048576),
    "curve_secret_file": ("a", Path("a")),
    "notice_s": ("5", 5.0),
    "hedge_after_s": ("1.5", 1.5),
    "hedge_ratio": ("0.1", 0.1),
    "drain_s": ("600", 600.0),
    "reserve": ("at_prefill_done", Reserve.AT_PREFILL_DONE),
    "disaggregate": ("always", Disaggregate.ALWAYS),
    "queue_max": ("5", 5),
    "queue_s": ("20", 20.0),
    "prefill_queue_s": ("1.5", 1.5),
    "ttft_objective_s": ("2", 2.0),
    "itl_objective_s": ("0.05", 0.05),
    "tenant_tokens_per_s": ("1000", 1000.0),
    "tenant_burst_s": ("3", 3.0),
    "tenant_shares": ("a=2,b=0.5,", {"a": 2.0, "b": 0.5}),
    "tenant_priorities": ("a=-5,*=2", {"a": -5, "*": 2}),
    "trust_tenant_header": ("true", True),
    "admin_port": ("0", 0),
    "admin_key_file": ("k", Path("k")),
    "api_docs": ("true", True),
    "body_bytes_max": ("7", 7),
    "bodies_bytes_max": ("8", 8),
    "body_s": ("9", 9.0),
    "header_bytes_max": ("10", 10),
    "headers_max": ("11", 11),
    "header_s": ("12", 12.0),
    "connections_max": ("13", 13),
    "idle_s": ("14", 14.0),
    "unread_s": ("15", 15.0),
    "json_depth_max": ("16", 16),
    "json_values_max": ("17", 17),
    "token_ids_max": ("18", 18),
    "text_chars_max": ("19", 19),
    "prompts_max": ("20", 20),
    "sequences_max": ("21", 21),
    "messages_max": ("22", 22),
    "tools_max": ("30", 30),
    "input_items_max": ("32", 32),
    "entries_max": ("31", 31),
    "stops_max": ("23", 23),
    "stop_chars_max": ("24", 24),
    "bad_words_max": ("25", 25),
    "logit_bias_max": ("26", 26),
    "grammar_bytes_max": ("27", 27),
    "grammar_s": ("28", 28.0),
    "preparing_max": ("29", 29),
    "curve_workers_file": ("b", Path("b")),
    "discover": ("kubernetes", Discover.KUBERNETES),
    "discover_ports": ("prefill=7000,decode=7001,", {"prefill": 7000, "decode": 7001}),
    "discover_selector": ("a=b,c", "a=b,c"),
    "discover_role_label": ("app", "app"),
    "discover_leaders": ("decode,prefill", ("decode", "prefill")),
    "discover_namespace": ("inference", "inference"),
    "discover_api": ("https://10.0.0.1:6443", "https://10.0.0.1:6443"),
    "discover_token_file": ("t", Path("t")),
    "discover_ca_file": ("c", Path("c")),
    "discover_names": ("decode=d.default.svc", {"decode": "d.default.svc"}),
    "discover_file": ("f", Path("f")),
    "discover_debounce_s": ("0.5", 0.5),
}
CONTROLLER: dict[str, tuple[str, Any]] = {
    "group": ("tandem", "tandem"),
    "namespace": ("inference", "inference"),
    "metrics_ports": ("router=1,p=2,decode=3", {"router": 1, "p": 2, "decode": 3}),
    "dry_run": ("true", True),
    "router_role": ("router", "router"),
    "prefill_role": ("p", "p"),
    "decode_role": ("decode", "decode"),
    "prefill_min": ("2", 2),
    "prefill_max": ("9", 9),
    "decode_min": ("1", 1),
    "decode_max": ("1", 1),
    "ttft_objective_s": ("1.5", 1.5),
    "itl_objective_s": ("0.05", 0.05),
    "attainment": ("0.9", 0.9),
    "look_s": ("5", 5.0),
    "startup_s": ("120", 120.0),
    "up_cooldown_s": ("10", 10.0),
    "down_cooldown_s": ("20", 20.0),
    "down_window_s": ("30", 30.0),
    "caution": ("2.5", 2.5),
    "lease_name": ("l", "l"),
    "lease_s": ("30", 30),
    "identity": ("i", "i"),
    "http_host": ("0.0.0.0", "0.0.0.0"),
    "http_port": ("0", 0),
    "address_file": ("/address.json", Path("/address.json")),
    "discover_selector": ("a=b,c", "a=b,c"),
    "discover_role_label": ("app", "app"),
    "discover_leaders": ("decode,prefill", ("decode", "prefill")),
    "discover_api": ("https://10.0.0.1:6443", "https://10.0.0.1:6443"),
    "discover_token_file": ("t", Path("t")),
    "discover_ca_file": ("c", Path("c")),
    "discover_debounce_s": ("0.5", 0.5),
}
KINDS: list[tuple[type[BaseSettings], dict[str, tuple[str, Any]]]] = [
    (WorkerSettings, WORKER),
    (RouterSettings, ROUTER),
    (ControllerSettings, CONTROLLER),
]
NEEDED = {
    WorkerSettings: ("role", "model"),
    RouterSettings: ("model",),
    ControllerSettings: ("group", "metrics_ports"),
}
ENOUGH = {
    WorkerSettings: ("role", "model"),
    RouterSettings: ("model", "workers"),
    ControllerSettings: ("group", "metrics_ports", "prefill_role"),
}


@pytest.fixture(autouse=True)
def _no_variables_of_ours() -> Iterator[None]:
    others = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("WORKER_", "ROUTER_", "CONTROLLER_"))
    }
    with mock.patch.dict(os.environ, others, clear=True):
        yield


def read(kind: type[BaseSettings], *argv: str) -> Any:
    return read_settings(kind, argv, prog=PROG, description="It.")[0]


def needed(kind: type[BaseSettings], samples: dict[str, tuple[str, Any]]) -> list[str]:
    return [f"{flag(n)}={samples[n][0]}" for n in ENOUGH[kind]]


def stops(capsys: pytest.CaptureFixture[str], kind: type[BaseSettings], *argv: str) -> str:
    """The one line that it ends with."""
    with pytest.raises(SystemExit) as ended:
        read(kind, *argv)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert not told.out
    assert told.err.startswith(f"{PROG}: ")
    assert told.err.count("\n") == 1
    assert told.err.endswith("\n")
    return told.err


@pytest.mark.parametrize(("kind", "samples"), KINDS)
def test_every_setting_comes_back_from_its_flag_and_from_its_variable(
    kind: type[BaseSettings], samples: dict[str, tuple[str, Any]]
) -> None:
    expected = {name: value for name, (_, value) in samples.items()}
    assert expected.keys() == kind.model_fields.keys()
    flags = [f"{flag(name)}={text}" for name, (text, _) in samples.items()]
    assert read(kind, *flags).model_dump() == expected
    prefix = kind.model_config["env_prefix"]
    variables = {variable(prefix, name): text for name, (text, _) in samples.items()}
    with mock.patch.dict(os.environ, variables):
        assert read(kind).model_dump() == expected


@given(
    st.integers(0, 65535),
    st.floats(0, 3600, exclude_min=True),
    st.sampled_from(Role),
    st.booleans(),
)
def test_what_is_in_range_is_taken_as_it_is(
    port: int, seconds: float, role: Role, by_flag: bool
) -> None:
    values = {"role": role.value, "model": "m", "port": str(port), "lease_s": repr(seconds)}
    if by_flag:
        found = read(WorkerSettings, *(f"{flag(n)}={v}" for n, v in values.items()))
    else:
        variables = {variable("WORKER_", n): v for n, v in values.items()}
        with mock.patch.dict(os.environ, variables):
            found = read(WorkerSettings)
    assert (found.port, found.lease_s, found.role) == (port, seconds, role)


@pytest.mark.parametrize(("kind", "samples"), KINDS)
def test_a_flag_wins_over_its_variable_and_the_last_flag_over_the_first(
    kind: type[BaseSettings],
    samples: dict[str, tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "port" if "port" in kind.model_fields else "http_port"
    port = flag(name)

    def given(*argv: str) -> int:
        found: int = getattr(read(kind, *needed(kind, samples), *argv), name)
        return found

    monkeypatch.setenv(variable(kind.model_config["env_prefix"], name), "1")
    assert given() == 1
    assert given(port, "2") == 2
    assert given(f"{port}=2", f"{port}=3") == 3


@pytest.mark.parametrize("bad", ["-1", "65536", "x", "1.5", "", "tcp://10.0.0.1:80"])
@pytest.mark.parametrize(
    ("kind", "samples", "name"),
    [(*KINDS[0], "port"), (*KINDS[0], "http_port"), (*KINDS[1], "port")],
)
def test_a_port_that_is_none_stops_it(
    kind: type[BaseSettings],
    samples: dict[str, tuple[str, Any]],
    name: str,
    bad: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused_both_ways(kind, samples, name, bad, capsys)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(
            (n, b)
            for n in ("lease_s", "drain_s")
            for b in ("0", "-1", "3600.5", "nan", "inf", "30s")
        ),
        ("role", "router"),
        ("role", ""),
        ("model", ""),
        ("engine", "trt"),
        ("host", ""),
        ("worker_id", ""),
        ("worker_id", "two words"),
        ("worker_id", "x" * 254),
        ("worker_id", "line\nline"),
        ("kv_connector", "lmcache"),
        ("kv_transports", "tcp,"),
        ("kv_transports", "carrier-pigeon"),
        ("kv_checksums", "some"),
        ("kv_read_s", "0"),
        ("address_file", ""),
        ("address_file", "/no/such/folder/file"),
    ],
)
def test_a_workers_value_out_of_range_stops_it(
    name: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_both_ways(WorkerSettings, WORKER, name, bad, capsys)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("workers", ""),
        ("workers", ","),
        ("workers", "a:1"),
        ("workers", "tcp://a"),
        ("workers", "tcp://a:0"),
        ("workers", "tcp://a:65536"),
        ("workers", "tcp://*:1"),
        ("workers", "http://a:1"),
        ("workers", "tcp://a:1 tcp://b:1"),
        ("workers", "tcp://a:1,tcp://a:1"),
        ("model", ""),
        ("host", ""),
        ("discover", "consul"),
        ("discover_ports", "prefill"),
        ("discover_ports", "prefill=0"),
        ("discover_ports", "a=1,a=2"),
        ("discover_names", "decode="),
        ("discover_api", "10.0.0.1"),
    ],
)
def test_a_routers_value_out_of_range_stops_it(
    name: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_both_ways(RouterSettings, ROUTER, name, bad, capsys)


def refused_both_ways(
    kind: type[BaseSettings],
    samples: dict[str, tuple[str, Any]],
    name: str,
    bad: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [f for f in needed(kind, samples) if not f.startswith(f"{flag(name)}=")]
    assert f" {flag(name)} " in stops(capsys, kind, *given, f"{flag(name)}={bad}")
    its = variable(kind.model_config["env_prefix"], name)
    with mock.patch.dict(os.environ, {its: bad}):
        assert f" {its} " in stops(capsys, kind, *given)


@pytest.mark.parametrize(("kind", "samples"), KINDS)
def test_what_is_needed_and_not_there_is_named_both_ways(
    kind: type[BaseSettings],
    samples: dict[str, tuple[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = stops(capsys, kind)
    for name in NEEDED[kind]:
        assert f"{flag(name)} or {variable(kind.model_config['env_prefix'], name)}" in told


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("", "--workers or ROUTER_WORKERS, or --discover or ROUTER_DISCOVER"),
        ("--discover=file", "--discover file needs --discover-file"),
        ("--discover=kubernetes --discover-ports=a=1", "needs --discover-selector"),
        ("--discover=kubernetes --discover-selector=a", "needs --discover-ports"),
        ("--discover=dns --discover-ports=a=1", "needs --discover-names"),
        (
            "--discover=dns --discover-ports=a=1 --discover-names=a=x,b=y",
            "--discover-ports lacks b",
        ),
    ],
)
def test_a_router_is_told_where_its_workers_are(
    given: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert missing in stops(capsys, RouterSettings, "--model=m", *given.split())


@pytest.mark.parametrize(("kind", "samples"), KINDS)
def test_a_variable_that_nothing_reads_stops_it_and_the_nearest_is_named(
    kind: type[BaseSettings],
    samples: dict[str, tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = kind.model_config["env_prefix"]
    name = NEEDED[kind][-1].upper()
    typo = name[:-2] + name[:-3:-1]
    monkeypatch.setenv(f"{prefix}{typo}", "m")
    told = stops(capsys, kind, *needed(kind, samples))
    assert f"{prefix}{typo} is set" in told
    assert f"did you mean {prefix}{name}?" in told


def test_a_variable_of_another_process_or_of_none_is_nobodys_business(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROUTER_LEESE_S", "x")
    monkeypatch.setenv("WORKERS", "x")
    assert read(WorkerSettings, "--role=mixed", "--model=m").lease_s == 30.0


def test_what_kubernetes_sets_for_a_service_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROUTER_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("ROUTER_PORT", "tcp://10.0.0.1:80")
    told = stops(capsys, RouterSettings, "--model=m", "--workers=tcp://a:1")
    assert "enableServiceLinks: false" in told


@pytest.mark.parametrize(("kind", "samples"), KINDS[:2])
@pytest.mark.parametrize("which", [0, 1])
def test_one_key_file_without_the_other_stops_it(
    kind: type[BaseSettings],
    samples: dict[str, tuple[str, Any]],
    which: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = [name for name in kind.model_fields if name.startswith("curve_")]
    told = stops(capsys, kind, *needed(kind, samples), flag(both[which]), "file")
    assert all(flag(name) in told for name in both)


def test_flags_of_the_engines_own_pass_through_in_their_order() -> None:
    theirs = [
        "--max-model-len",
        "2048",
        "--enforce-eager",
        "--dtype=float32",
        "--rol",
        "x",
        "-tp",
        "1",
    ]
    argv = [*theirs[:3], "--role", "mixed", *theirs[3:5], "--model", "m", *theirs[5:]]
    settings, rest = read_settings(WorkerSettings, argv, prog=PROG, description="It.")
    assert settings.role is Role.MIXED
    assert rest == theirs


def test_settings_can_not_be_changed() -> None:
    settings = read(WorkerSettings, "--role=mixed", "--model=m")
    with pytest.raises(ValidationError, match="frozen"):
        settings.lease_s = 1.0


@pytest.mark.parametrize(("kind", "samples"), KINDS)
def test_help_has_every_flag_and_every_variable(
    kind: type[BaseSettings],
    samples: dict[str, tuple[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(kind, "--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for name in samples:
        assert flag(name) in told
        assert variable(kind.model_config["env_prefix"], name) in told


@pytest.mark.parametrize("process", ["worker", "router"])
def test_a_process_with_a_mistyped_variable_ends_at_once_with_one_line(process: str) -> None:
    name = f"{process.upper()}_LEESE_S"
    ended = subprocess.run(
        [sys.executable, "-m", "tandem", process, "--model", "m"],
        cwd=TOP, env={**os.environ, name: "3"}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(f"tandem {process}: {name} is set")


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--prefill-min=3", "--prefill-max=2"], "--prefill-min 3 is more than --prefill-max 2"),
        (["--decode-min=9"], "--decode-min 9 is more than --decode-max 8"),
        (["--decode-role=prefill"], "must differ"),
        (["--router-role=front"], "--metrics-ports lacks front"),
        (["--decode-min=0"], "greater than or equal to 1"),
        (["--lease-s=1.5"], "--lease-s '1.5'"),
    ],
)
def test_what_a_controller_can_t_work_with_stops_it(
    flags: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = "--metrics-ports=router=1,prefill=2,decode=3"
    assert wrong in stops(capsys, ControllerSettings, "--group=g", ports, *flags)


def test_a_flag_that_is_yes_or_no_may_stand_alone() -> None:
    given = ["--group=g", "--metrics-ports=router=1,prefill=2,decode=3"]
    assert read(ControllerSettings, *given, "--dry-run").dry_run is True
    assert read(ControllerSettings, "--dry-run", *given).dry_run is True
    assert read(ControllerSettings, *given, "--dry-run=false").dry_run is False
    assert read(ControllerSettings, *given).dry_run is False
