"""What a worker's process can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers.api import MESSAGE_BYTES_MAX, ROUTER_SILENCE_S, Role
from workers.flags import FileToWrite, MessageBytes, Port, Seconds, Text


class WorkerSettings(BaseSettings):
    """Built once, in `__main__`. Seconds and bytes; docs/settings.md has them all."""

    model_config = SettingsConfigDict(env_prefix="WORKER_", frozen=True, extra="forbid")

    role: Role = Field(description="what it accepts")
    model: Text = Field(description="a prepared name, a local path or a hub name")
    engine: Literal["vllm", "sim"] = Field("vllm", description="the real one, or a simulated one")
    host: Text = Field("127.0.0.1", description="address that others reach this at")
    port: Port = Field(0, description="token channel; 0 takes a free one")
    http_port: Port = Field(0, description="probes and metrics; 0 takes a free one")
    worker_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._:-]{1,253}$",
        description="stable over restarts, the pod's name; else role, host and process id",
    )
    address_file: FileToWrite | None = Field(
        None, description="where its addresses are written once the sockets are bound"
    )
    load_s: Seconds = Field(1800.0, description="how long loading may take, in seconds")
    lease_s: Seconds = Field(30.0, description="how long KV is kept unread, in seconds")
    drain_s: Seconds = Field(30.0, description="how long a drain waits, in seconds")
    router_silence_s: float = Field(
        ROUTER_SILENCE_S,
        ge=1,
        le=3600,
        description="how long a silent router's requests are kept, in seconds",
    )
    kv_connector: Literal["tandem", "nixl", "none"] = Field(
        "tandem", description="how KV is handed off"
    )
    kv_transports: str = Field(
        "ucx,tcp,collective",
        pattern=r"^(ucx|tcp|collective)(,(ucx|tcp|collective))*$",
        description="what it offers and reads over, best first; what is missing here is left out",
    )
    kv_checksums: Literal["off", "sampled", "full"] = Field(
        "sampled", description="of the KV that it computes; its receivers compare"
    )
    kv_answer_s: Seconds = Field(5.0, description="how long a sender's answer may take, in seconds")
    kv_read_s: Seconds = Field(30.0, description="how long one read of KV may take, in seconds")
    message_bytes_max: MessageBytes = Field(
        MESSAGE_BYTES_MAX, description="largest message of the token channel; as the routers'"
    )
    curve_secret_file: Path | None = Field(
        None, description="the workers' secret key: token channel and handoff ask for it"
    )
    curve_routers_file: Path | None = Field(
        None, description="public keys of the routers that may connect, one a line"
    )

    @model_validator(mode="after")
    def _both_keys_or_none(self) -> Self:
        if (self.curve_secret_file is None) != (self.curve_routers_file is None):
            raise ValueError("--curve-secret-file and --curve-routers-file go together")
        return self
