"""Which workers the twin has, how fast each is, and how far apart they are."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workers.api import Role
from workers.engines.sim_settings import SimSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

CPU: Final = SimSettings(streams=True, block_tokens=128, blocks_total=360)
"""SmolLM2-135M on one core, with 1 GiB of KV cache; `tandem calibrate` knows better."""
GPU: Final = SimSettings(
    prefill_tokens_per_s=1 / 4.4e-5, step_s=0.012, pair_s=8.3e-10, stream_s=3e-5,
    context_token_s=2e-8, token_bytes=327_680, block_tokens=512, blocks_total=2600,
    pull_bytes_per_s=1e11, pull_latency_s=0.003, max_model_len=131_072, chunk_tokens=8192,
    streams=True,
)  # fmt: skip
"""A 70B model (80 layers of 8,192, 8 KV heads of 128, 16 bits) on eight H100s, by its roofline and
not measured: 140 GFLOP a token and 2.6 MFLOP a pair at 40 % of 8 PFLOP/s; 140 GB of weights and
320 KiB a token of context at 60 % of 27 TB/s, and 3 ms a step besides; 440 GB for KV; RDMA at
100 GB/s."""
ENGINES: Final = {"smollm2-cpu": CPU, "llama70b-8xh100": GPU}
WORKERS_MAX: Final = 10_000
_FIELDS: Final = {f.name: type(getattr(CPU, f.name)) for f in fields(SimSettings)}
_MORE: Final = {"kv_tokens"}
"""Instead of `blocks_total`: it stays what it is when `block_tokens` changes."""


class FleetInvalid(Exception):
    """What is wrong with a fleet's description."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    worker_id: str
    role: Role
    settings: SimSettings
    host: str = ""
    """Those of one host slow each other; none: nobody does."""
    beside: float = 1.0
    """What its steps' times are multiplied by while another of its host computes."""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    workers: tuple[WorkerPlan, ...]
    latency_s: float = 0.0002
    """Between router and worker, one way."""
    front_s: float = 0.002
    """From the client's request to the dispatch, and back with the first token."""

    def with_blocks_of(self, tokens: int) -> FleetPlan:
        """Every engine with that block size and as many tokens of KV as before, or a little less.

        Raises `FleetInvalid`.
        """
        return replace(
            self,
            workers=tuple(
                replace(w, settings=_settings(w.settings, {"block_tokens": tokens}, w.worker_id))
                for w in self.workers
            ),
        )


def read(text: str, engine: str = "smollm2-cpu") -> FleetPlan:
    """`prefill=2,decode=2` with that engine, or a .toml or .json file (docs/twin.md).

    Raises `FleetInvalid`.
    """
    if engine not in ENGINES:
        raise FleetInvalid(f"no engine is called {engine}: there are {', '.join(ENGINES)}")
    path = Path(text)
    if path.suffix in (".toml", ".json"):
        return _from_file(path, engine)
    groups = []
    for part in text.split(","):
        role, _, count = part.strip().partition("=")
        if not count.isdigit():
            raise FleetInvalid(f"{part!r} is no ROLE=COUNT, and {text!r} no .toml or .json file")
        groups.append({"role": role, "count": int(count)})
    return _from_table({"engine": engine, "workers": groups}, "fleet", engine)


def _from_file(path: Path, engine: str) -> FleetPlan:
    try:
        content = path.read_text(encoding="utf-8")
        table = tomllib.loads(content) if path.suffix == ".toml" else json.loads(content)
    except OSError as error:
        raise FleetInvalid(f"{path.name}: {error.strerror}") from error
    except ValueError as error:
        raise FleetInvalid(f"{path.name}: {error}") from error
    if not isinstance(table, dict):
        raise FleetInvalid(f"{path.name}: not a table")
    return _from_table(table, path.name, engine)


def _from_table(table: Mapping[str, Any], where: str, engine: str) -> FleetPlan:
    _only(table, {"engine", "settings", "latency_ms", "front_ms", "workers"}, where)
    base = ENGINES.get(table.get("engine", engine))
    if base is None:
        raise FleetInvalid(f"{where}: no engine is called {table['engine']!r}")
    base = _settings(base, table.get("settings", {}), where)
    workers: list[WorkerPlan] = []
    for at, group in enumerate(table.get("workers", [])):
        workers += _group(group, f"{where}, workers {at + 1}", base)
    names = [w.worker_id for w in workers]
    if len(set(names)) < len(names):
        raise FleetInvalid(f"{where}: two workers have one name")
    if not any(w.role is not Role.PREFILL for w in workers) or len(workers) > WORKERS_MAX:
        raise FleetInvalid(f"{where}: it needs a decode or mixed worker, and at most {WORKERS_MAX}")
    default = FleetPlan(())
    latency_ms = _number(table, "latency_ms", default.latency_s * 1000, where)
    front_ms = _number(table, "front_ms", default.front_s * 1000, where)
    return FleetPlan(tuple(workers), latency_ms / 1000, front_ms / 1000)


def _group(group: Mapping[str, Any], where: str, base: SimSettings) -> list[WorkerPlan]:
    if not isinstance(group, dict):
        raise FleetInvalid(f"{where}: not a table")
    _only(group, {"role", "count", "name", "engine", "settings", "host", "beside"}, where)
    try:
        role = Role(group.get("role", ""))
    except ValueError:
        roles = ", ".join(Role)
        raise FleetInvalid(f"{where}: role is {group.get('role')!r}, not {roles}") from None
    count, name = group.get("count", 1), group.get("name", str(role))
    if type(count) is not int or not 0 <= count <= WORKERS_MAX or not isinstance(name, str):
        raise FleetInvalid(f"{where}: count or name is none")
    if "engine" in group:
        if group["engine"] not in ENGINES:
            raise FleetInvalid(f"{where}: no engine is called {group['engine']!r}")
        base = ENGINES[group["engine"]]
    settings = _settings(base, group.get("settings", {}), where)
    host, beside = group.get("host", ""), _number(group, "beside", 1.0, where)
    if not isinstance(host, str) or beside < 1:
        raise FleetInvalid(f"{where}: host is no name, or beside is below 1")
    return [WorkerPlan(f"{name}-{n}", role, settings, host, beside) for n in range(count)]


def _settings(base: SimSettings, changes: Mapping[str, Any], where: str) -> SimSettings:
    if not isinstance(changes, dict):
        raise FleetInvalid(f"{where}: settings are no table")
    _only(changes, _FIELDS.keys() | _MORE, f"{where}, settings")
    values: dict[str, Any] = {}
    for name, given in changes.items():
        wanted = _FIELDS.get(name, int)
        value = float(given) if wanted is float and type(given) is int else given
        if wanted is tuple:
            value = _numbers(given)
        elif type(value) is not wanted or value < 0:
            value = None
        if value is None:
            raise FleetInvalid(f"{where}: {name} is {given!r}")
        values[name] = value
    kv_tokens = values.pop("kv_tokens", base.blocks_total * base.block_tokens)
    size = values.get("block_tokens", base.block_tokens)
    if size < 1 or values.get("prefill_tokens_per_s", 1.0) <= 0:
        raise FleetInvalid(f"{where}: block_tokens and prefill_tokens_per_s are above 0")
    values.setdefault("blocks_total", kv_tokens // size)
    if values["blocks_total"] < 1:
        raise FleetInvalid(f"{where}: {kv_tokens} tokens of KV are no block of {size}")
    return replace(base, **values)


def _numbers(given: Any) -> tuple[float, ...] | None:
    """Of either sign."""
    if not isinstance(given, list) or any(type(n) not in (int, float) for n in given):
        return None
    return tuple(float(n) for n in given)


def _only(table: Mapping[str, Any], known: set[str] | frozenset[str], where: str) -> None:
    if strange := sorted(set(table) - set(known)):
        raise FleetInvalid(
            f"{where}: {', '.join(strange)} is not known; {', '.join(sorted(known))}"
        )


def _number(table: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = table.get(name, default)
    if type(value) not in (int, float) or value < 0:
        raise FleetInvalid(f"{where}: {name} is {value!r}")
    return float(value)
