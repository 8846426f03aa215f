"""What a controller's process can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from controller.core.sizing import SizingPolicy
from controller.flags import Ports, Roles, Url
from workers.flags import FileToWrite, Port, Seconds, Text

_USUAL = SizingPolicy()
Replicas = Annotated[int, Field(ge=1, le=10_000)]


class ControllerSettings(BaseSettings):
    """Built once, in `__main__`; docs/settings.md has them all."""

    model_config = SettingsConfigDict(env_prefix="CONTROLLER_", frozen=True, extra="forbid")

    group: Text = Field(description="the RoleBasedGroup's name")
    namespace: Text | None = Field(None, description="its namespace; else the pod's own")
    metrics_ports: Ports = Field(
        description="where each role has /metrics, role=port with commas between"
    )
    dry_run: bool = Field(False, description="decide and tell, and scale nothing")
    router_role: Text = Field("router", description="the role that routers are in")
    prefill_role: Text = Field("prefill", description="the role that prefill workers are in")
    decode_role: Text = Field("decode", description="the role that decode workers are in")
    prefill_min: Replicas = Field(1, description="least prefill workers")
    prefill_max: Replicas = Field(8, description="most prefill workers")
    decode_min: Replicas = Field(1, description="least decode workers")
    decode_max: Replicas = Field(8, description="most decode workers")
    ttft_objective_s: float = Field(_USUAL.ttft_s, gt=0, description="as the routers have it")
    itl_objective_s: float = Field(_USUAL.itl_s, gt=0, description="as the routers have it")
    attainment: float = Field(
        _USUAL.attainment,
        gt=0,
        le=1,
        description="share of requests that should meet both objectives",
    )
    look_s: Seconds = Field(_USUAL.look_s, description="between two looks at the group")
    startup_s: Seconds = Field(
        _USUAL.startup_s,
        description="from asking for a worker until it serves, before it has been seen",
    )
    up_cooldown_s: Seconds = Field(
        _USUAL.up_cooldown_s, description="between two enlargements of a role"
    )
    down_cooldown_s: Seconds = Field(
        _USUAL.down_cooldown_s,
        description="after any change of a role it is not made smaller for so long",
    )
    down_window_s: Seconds = Field(
        _USUAL.down_window_s, description="a role is made smaller only to what sufficed for so long"
    )
    caution: float = Field(
        _USUAL.caution, ge=0, le=10, description="standard deviations on top of the forecast"
    )
    lease_name: Text | None = Field(None, description="else the group's name and -controller")
    lease_s: int = Field(15, ge=1, le=3600, description="a dead leader is replaced after so long")
    identity: Text | None = Field(None, description="its name in the Lease; else the host's")
    http_host: Text = Field("127.0.0.1", description="address that it listens at")
    http_port: Port = Field(8080, description="probes, metrics, decisions; 0 takes a free one")
    address_file: FileToWrite | None = Field(
        None, description="where its address is written once the socket is bound"
    )
    discover_selector: Text | None = Field(
        None, description="of EndpointSlices, by their labels; else the group's"
    )
    discover_role_label: Text = Field(
        "rbg.workloads.x-k8s.io/role-name", description="their label that has the role"
    )
    discover_leaders: Roles | None = Field(
        None, description="leader-worker roles, of which only the leaders are workers to us"
    )
    discover_api: Url | None = Field(
        None, description="API server; else the one that a pod is told of"
    )
    discover_token_file: Path | None = Field(None, description="else the service account's")
    discover_ca_file: Path | None = Field(None, description="else the service account's")
    discover_debounce_s: Seconds = Field(
        1, description="so long a ready worker may seem to be out of service"
    )

    @model_validator(mode="after")
    def _bounds_and_roles(self) -> Self:
        for role in ("prefill", "decode"):
            least, most = getattr(self, f"{role}_min"), getattr(self, f"{role}_max")
            if least > most:
                raise ValueError(f"--{role}-min {least} is more than --{role}-max {most}")
        roles = [self.router_role, self.prefill_role, self.decode_role]
        if len(set(roles)) < len(roles):
            raise ValueError("--router-role, --prefill-role and --decode-role must differ")
        if missing := sorted(set(roles) - self.metrics_ports.keys()):
            raise ValueError(f"--metrics-ports lacks {', '.join(missing)}")
        return self
