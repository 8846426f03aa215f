"""Where the API server is, and who we are to it: service account files or flags."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Mapping

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class NoCluster(Exception):
    """This process is in no pod, and was not told what a pod would know."""


@dataclass(frozen=True, slots=True)
class Access:
    """To one namespace of one API server."""

    url: str
    """`https://host:port`, or `http://…` where there is a proxy."""
    namespace: str
    token_file: Path | None = None
    """Read for every request: the kubelet writes a new token long before the old one ends."""
    ca_file: Path | None = None

    @classmethod
    def find(
        cls,
        environ: Mapping[str, str],
        *,
        url: str | None = None,
        namespace: str | None = None,
        token_file: Path | None = None,
        ca_file: Path | None = None,
        account: Path = ACCOUNT,
    ) -> Self:
        """What is given, and for the rest what a pod is told. Raises `NoCluster`."""
        in_pod = url is None
        if url is None:
            host, port = (environ.get(f"KUBERNETES_SERVICE_{n}") for n in ("HOST", "PORT"))
            if not host:
                raise NoCluster("no API server: KUBERNETES_SERVICE_HOST is not set, as in a pod")
            url = f"https://{f'[{host}]' if ':' in host else host}:{port or 443}"
        if in_pod:
            token_file, ca_file = token_file or account / "token", ca_file or account / "ca.crt"
        for file in filter(None, (token_file, ca_file)):
            if not file.is_file():
                raise NoCluster(f"no file {file}: has the pod a service account?")
        if namespace is None:
            try:
                namespace = (account / "namespace").read_text(encoding="utf-8").strip()
            except OSError:
                raise NoCluster("no namespace: it is given by no flag and no file") from None
        return cls(url.rstrip("/"), namespace, token_file, ca_file)

    def headers(self) -> dict[str, str]:
        """Raises OSError when the token can't be read."""
        if self.token_file is None:
            return {}
        return {"Authorization": f"Bearer {self.token_file.read_text(encoding='utf-8').strip()}"}

    def client(self) -> httpx.AsyncClient:
        """For one request: the authority may have been renewed since the last one.

        It waits without end: who uses it knows for how long. Raises OSError for a bad `ca_file`.
        """
        trust = (
            ssl.create_default_context(cafile=self.ca_file) if self.url[:6] == "https:" else False
        )
        return httpx.AsyncClient(
            base_url=self.url, headers=self.headers(), verify=trust, timeout=None, trust_env=False
        )
