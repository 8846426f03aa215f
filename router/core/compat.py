"""Who may work with whom, told from what the two sides say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.api import ACCEPTS, PROTOCOL, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.api import WorkerHello


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """What this router serves. A digest of None is not compared: it has nothing to compare."""

    router_id: str
    model: str
    tokenizer_digest: str | None
    model_digest: str | None
    max_model_len: int
    """Tokens, prompt and output together."""
    vllm_version: str | None = None
    """The front's. Requests travel in vLLM's own encoding, which has no names and no version: of
    another release they would be misread, and clients told that they are wrong."""


def refusal(router: RouterFacts, worker: WorkerHello) -> str | None:
    """Why this router can't use that worker, naming both sides; None when it can."""
    pairs = [
        ("protocol", PROTOCOL, worker.protocol),
        ("tokenizer digest", router.tokenizer_digest, worker.tokenizer_digest),
        ("model digest", router.model_digest, worker.model_digest),
    ]
    if worker.engine == "vllm" and router.vllm_version is not None:
        releases = _release(router.vllm_version), _release(worker.engine_version)
        pairs.append(("vLLM version", *releases))
    for what, ours, theirs in pairs:
        if ours is not None and ours != theirs:
            return (
                f"{what} differs: router {router.router_id} ({router.model}) has {ours}, "
                f"worker {worker.worker_id} ({worker.model}, {worker.engine} "
                f"{worker.engine_version}) has {theirs}"
            )
    if worker.max_model_len < router.max_model_len:
        return (
            f"worker {worker.worker_id} serves at most {worker.max_model_len} tokens, router "
            f"{router.router_id} {router.max_model_len}: start both with the same --max-model-len"
        )
    return None


def _release(version: str) -> str:
    """Without what it was built for: a router has the CPU's build and its workers the GPU's."""
    return version.partition("+")[0]


def can_hand_off(sender: WorkerHello, receiver: WorkerHello) -> bool:
    """Whether KV blocks that `sender` computed may be read and used by `receiver`."""
    return (
        sender.kv_digest == receiver.kv_digest
        and sender.model_digest == receiver.model_digest
        and bool(set(sender.transports) & set(receiver.transports))
    )


def unpaired(worker: WorkerHello, others: Iterable[WorkerHello]) -> str | None:
    """Why `worker` can hand off with none of the others, naming both sides of one pair.

    None when it can with one of them, or when none of them is of the other role.
    """
    pairs = [
        (sender, receiver)
        for other in others
        for sender, receiver in ((worker, other), (other, worker))
        if Phase.PREFILL in ACCEPTS[sender.role] and Phase.DECODE in ACCEPTS[receiver.role]
    ]
    if not pairs or any(can_hand_off(*pair) for pair in pairs):
        return None
    return "; ".join(
        f"{w.worker_id} ({w.role}) keeps {w.kv_digest} of model {w.model_digest} and offers "
        f"{', '.join(w.transports) or 'no transport'}"
        for w in pairs[0]
    )
