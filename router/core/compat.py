"""Who may work with whom, told from what the two sides say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from router.core.belief import NAME_MAX, hello_doubt
from workers.api import ACCEPTS, MESSAGE_BYTES_MAX, PROTOCOL, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.api import WorkerHello


NO_CONSTRAINTS: Final = "vLLM's defaults"


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
    constraints: str | None = None
    """The front's (`workers.constraints`)."""
    message_bytes_max: int = MESSAGE_BYTES_MAX
    """The largest message that it sends or takes."""


def refusal(router: RouterFacts, worker: WorkerHello) -> str | None:
    """Why this router can't use that worker, naming both sides; None when it can."""
    if router_doubts := hello_doubt(worker):
        who = worker.worker_id[:NAME_MAX]
        return f"router {router.router_id} does not believe worker {who}: {router_doubts}"
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
    if worker.engine == "vllm" and router.constraints not in (None, worker.constraints):
        return (
            f"reasoning parser or structured outputs differ: router {router.router_id} "
            f"({router.model}) has {router.constraints or NO_CONSTRAINTS}, worker "
            f"{worker.worker_id} ({worker.role}) has {worker.constraints or NO_CONSTRAINTS}: start "
            "all with the same --reasoning-parser, --reasoning-config and "
            "--structured-outputs-config"
        )
    if worker.max_model_len < router.max_model_len:
        return (
            f"worker {worker.worker_id} serves at most {worker.max_model_len} tokens, router "
            f"{router.router_id} {router.max_model_len}: start both with the same --max-model-len"
        )
    if worker.message_bytes_max != router.message_bytes_max:
        return (
            f"worker {worker.worker_id} takes and sends messages of {worker.message_bytes_max} "
            f"bytes, router {router.router_id} of {router.message_bytes_max}: start both with the "
            "same --message-bytes-max"
        )
    return None


def _release(version: str) -> str:
    """Without what it was built for: a router has the CPU's build and its workers the GPU's."""
    return version.partition("+")[0]


class Unlike(StrEnum):
    """Differences that keep two workers from handing off KV, told from their hellos."""

    MODEL = "model"
    LAYOUT = "layout"
    TRANSPORT = "transport"


def unlike(sender: WorkerHello, receiver: WorkerHello) -> Unlike | None:
    """Why KV blocks that `sender` computed can't be read and used by `receiver`; None: they can."""
    if sender.model_digest != receiver.model_digest:
        return Unlike.MODEL
    if sender.kv_digest != receiver.kv_digest:
        return Unlike.LAYOUT
    return None if set(sender.transports) & set(receiver.transports) else Unlike.TRANSPORT


def can_hand_off(sender: WorkerHello, receiver: WorkerHello) -> bool:
    """Whether KV blocks that `sender` computed may be read and used by `receiver`."""
    return unlike(sender, receiver) is None


_ADVICE: Final = {
    Unlike.MODEL: "start both with the same model",
    Unlike.LAYOUT: "start both with the same model, --dtype, --kv-cache-dtype, --block-size, "
    "--attention-backend and --tensor-parallel-size",
    Unlike.TRANSPORT: "give both a common one of --kv-transports",
}


def unpaired(worker: WorkerHello, others: Iterable[WorkerHello]) -> tuple[Unlike, str] | None:
    """Why `worker` can hand off with none of the others, naming both sides of one pair.

    None when it can with one of them, or when none of them is of the other role. Workers without
    any transport were started to hand nothing off (`--kv-connector none`) and count as none.
    """
    pairs = [
        (sender, receiver)
        for other in others
        for sender, receiver in ((worker, other), (other, worker))
        if Phase.PREFILL in ACCEPTS[sender.role]
        and Phase.DECODE in ACCEPTS[receiver.role]
        and sender.transports
        and receiver.transports
    ]
    reasons = [unlike(*pair) for pair in pairs]
    if not reasons or reasons[0] is None or None in reasons:
        return None
    what = reasons[0]
    sides = "; ".join(
        f"{w.worker_id} ({w.role}) keeps {w.kv_digest} of model {w.model_digest} and offers "
        f"{', '.join(w.transports)}"
        for w in pairs[0]
    )
    return what, f"{what} differs: {sides}; {_ADVICE[what]}"
