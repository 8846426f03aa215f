"""The router's fleet follows what discovery says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from controller.access import Access
from controller.core.peers import Kind, RoleFacts
from controller.discovery import Discovery
from controller.file import FileOfPeers
from controller.metrics import DiscoveryMetrics
from controller.names import Names
from controller.reflector import Reflector
from router.settings import Discover

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from controller.core.peers import Change
    from controller.sources import Source
    from router.link import Links
    from router.settings import RouterSettings


class Follower:
    """Changes of peers in, links kept. Two peers may share an address for a while."""

    def __init__(self, links: Links, fixed: Collection[str] = ()) -> None:
        """`fixed` addresses are not discovery's to judge."""
        self._links = links
        self._fixed = frozenset(fixed)
        self._at: dict[str, dict[str, Kind]] = {}

    def on_change(self, change: Change) -> None:
        """A ready peer is connected, a draining one gets nothing new, one that is gone is left."""
        peer = change.peer
        if peer.address in self._fixed:
            return
        here = self._at.setdefault(peer.address, {})
        if change.kind is Kind.GONE:
            here.pop(peer.uid, None)
        else:
            here[peer.uid] = change.kind
        if Kind.READY in here.values():
            self._links.connect(peer.address)
        elif here:
            self._links.rest(peer.address)
        else:
            del self._at[peer.address]
            self._links.disconnect(peer.address)


def make_source(settings: RouterSettings, environ: Mapping[str, str]) -> Source | None:
    """What `--discover` names. Raises `NoCluster` where it can't be."""
    match settings.discover:
        case Discover.KUBERNETES:
            access = Access.find(
                environ,
                url=settings.discover_api,
                namespace=settings.discover_namespace,
                token_file=settings.discover_token_file,
                ca_file=settings.discover_ca_file,
            )
            roles = {
                role: RoleFacts(port, role in (settings.discover_leaders or ()))
                for role, port in (settings.discover_ports or {}).items()
            }
            selector = settings.discover_selector or ""
            return Reflector(access, selector, settings.discover_role_label, roles)
        case Discover.DNS:
            return Names(settings.discover_names or {}, settings.discover_ports or {})
        case Discover.FILE:
            assert settings.discover_file is not None
            return FileOfPeers(settings.discover_file)
        case None:
            return None


def follow(
    source: Source, settings: RouterSettings, links: Links, clock: Callable[[], float]
) -> Discovery:
    """Discovery that keeps these links, with its metrics; it is yet to be run."""
    follower = Follower(links, settings.workers or ())
    discovery = Discovery(source, follower.on_change, settings.discover_debounce_s)
    DiscoveryMetrics(discovery, source.session if isinstance(source, Reflector) else None, clock)
    return discovery
