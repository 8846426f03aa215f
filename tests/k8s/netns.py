"""A node's network for pods: a bridge, and a namespace with an address of its own for each."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class NoNamespaces(Exception):
    """Network namespaces can't be made here; the message says why."""


class Network:
    """`<run>-node` has the bridge, so that no firewall of the machine's stands between pods.

    Whoever made it reaches the pods over one pair of devices, at `host`.
    """

    def __init__(self) -> None:
        """Raises `NoNamespaces`, and then leaves nothing behind."""
        if shutil.which("ip") is None:
            raise NoNamespaces("iproute2 is not installed")
        if os.geteuid() != 0:
            raise NoNamespaces("only root may make network namespaces")
        _sweep()
        self._run = f"tandem-{os.getpid()}-{secrets.token_hex(2)}"
        self._node = f"{self._run}-node"
        self._device = f"td{secrets.token_hex(4)}"
        self._made: list[str] = []
        self._addresses = self._free_addresses()
        self.host = next(self._addresses)
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _free_addresses(self) -> Iterator[str]:
        """Of a network that this machine has no route to but the one to everything."""
        for _ in range(20):
            prefix = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}"
            found = _ip("-j", "route", "show", "match", f"{prefix}.1")
            if all(route["dst"] == "default" for route in json.loads(found or "[]")):
                return iter([f"{prefix}.{n}" for n in range(1, 255)])
        raise NoNamespaces("no free network in 10.100.0.0/8")

    def _make(self) -> None:
        self._add(self._node)
        for command in (
            "link add bridge type bridge",
            # Else its ports forward nothing for seconds.
            "link set bridge type bridge stp_state 0 forward_delay 0",
            "link set bridge up",
        ):
            _ip("-n", self._node, *command.split())
        _ip(*f"link add {self._device} type veth peer name host netns {self._node}".split())
        _ip("-n", self._node, *["link", "set", "host", "master", "bridge", "up"])
        _ip("addr", "add", f"{self.host}/24", "dev", self._device)
        _ip("link", "set", self._device, "up")

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def add_pod(self, name: str) -> str:
        """Its address; what `enter` starts with this name has it."""
        pod, ip = self._pod(name), next(self._addresses)
        port = f"pod{ip.rsplit('.', 1)[1]}"
        self._add(pod)
        _ip(*f"-n {self._node} link add {port} type veth peer name eth0 netns {pod}".split())
        _ip(*f"-n {self._node} link set {port} master bridge up".split())
        _ip("-n", pod, "addr", "add", f"{ip}/24", "dev", "eth0")
        _ip("-n", pod, "link", "set", "eth0", "up")
        return ip

    def remove_pod(self, name: str) -> None:
        _ip("netns", "del", self._pod(name))
        self._made.remove(self._pod(name))

    def enter(self, name: str) -> list[str]:
        """What goes before a command that is to run there. It keeps the process id."""
        return ["ip", "netns", "exec", self._pod(name)]

    def close(self) -> None:
        """Devices go with their namespaces. Processes in them must have ended."""
        subprocess.run(["ip", "link", "del", self._device], check=False, capture_output=True)
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        self._made.clear()

    def _pod(self, name: str) -> str:
        return f"{self._run}-{name}"


def _sweep() -> None:
    """What a run left that was killed: its processes have ended with it."""
    for line in _ip("netns", "list").splitlines():
        found = re.match(r"tandem-([0-9]+)-", line)
        if found and not Path("/proc", found[1]).exists():
            subprocess.run(["ip", "netns", "del", line.split()[0]], check=False)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise NoNamespaces(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
