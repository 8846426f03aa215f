"""The contract between a router and a worker, one message type a struct.

A worker binds one ZeroMQ ROUTER socket, the *token channel*; each router connects a DEALER to it.
Every message is one frame of msgpack, a tagged array (see `encode` and `Decoder`).

1. The router sends `RouterHello`. The worker answers `WorkerHello`, or `Refused` when they can't
   speak together; a refused router may try again later (the worker may have been replaced).
   `Refused` answers anything else from a router that the worker does not know or has given up:
   what it sent is lost, and it begins again.
2. The router sends `Generate`, `Abort`, `Release` and, once a second, `Heartbeat`.
3. The worker sends one `Batch` an engine step with the `Delta` of every request that this router
   has in that step and its `Load`. A worker with nothing to say sends an empty `Batch` every
   `LOAD_INTERVAL_S`, so silence means trouble.

4. Prefix caches: each `Batch` carries what the worker's cache stored and removed since the last one
   to this router, numbered. The router asks (`KvAsk`) for all of it when it says hello and when a
   number is missing; `KvSnapshot`s answer, in parts.

A router is gone for a worker, which then aborts its requests, when its connection is, when it
greets anew over another one, or when it was silent for `ROUTER_SILENCE_S`. A router that is held up
is not gone: ZeroMQ's own thread answers heartbeats for it, and what it is sent waits. A worker that
is silent for `SILENCE_S`, or whose `Load.steps` stands still while `Load.busy`, is dead to the
router; time in which the router itself did not listen does not count.

Whatever belongs to one engine's own vocabulary (sampling parameters, logprobs, multimodal
features) travels as opaque bytes: `Generate.params` and `Delta.extras`.

A *ticket* says where a prompt's KV is, or will be. For a prefill worker with a `handoff_endpoint`
the router makes it (`make_ticket`) and gives the same to both workers, the decode worker at once or
when the prefill is done; for others it comes with the finished prefill as `Delta.ticket`, to be
carried on unread.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from kvtransfer import protocol as kv
from kvtransfer.core import items

PROTOCOL = 5
MALFORMED = kv.MALFORMED
LOAD_INTERVAL_S = 0.5
SILENCE_S = 5.0
MESSAGE_BYTES_MAX = 32 << 20
"""Default of the largest message on the token channel, either way: a million tokens of prompt, and
27 MB of images. A setting of both sides (`--message-bytes-max`)."""
"""After so long a silence a worker is lost, and so is a router that greets one still loading."""
ROUTER_SILENCE_S = 30.0
"""A worker keeps a silent router's requests for so long while nothing tells that it is gone. It
bounds how long blocks are held for a router whose machine vanished."""

Item = items.Item
marks = items.marks
within = items.within
joined = items.joined


class Role(StrEnum):
    """What a worker accepts: `Phase.PREFILL`, the other two, or all three."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Phase(StrEnum):
    """What one `Generate` asks of one worker."""

    PREFILL = "prefill"
    """Compute the prompt, keep the KV blocks under a lease for whoever has the ticket; emit no
    tokens, or with `Generate.relay` the first."""
    DECODE = "decode"
    """Pull the prompt's KV with `Generate.ticket`, as it is computed, then generate."""
    BOTH = "both"
    """Prefill and decode here; nothing is handed off."""


ACCEPTS: dict[Role, frozenset[Phase]] = {
    Role.PREFILL: frozenset({Phase.PREFILL}),
    Role.DECODE: frozenset({Phase.DECODE, Phase.BOTH}),
    Role.MIXED: frozenset(Phase),
}


class Finish(StrEnum):
    """Why a request ended on a worker. The first three are OpenAI's and vLLM's own words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    REPETITION = "repetition"
    PREFILLED = "prefilled"
    """`Phase.PREFILL` is done, and there is more to generate."""
    ERROR = "error"
    """The engine failed this request; `Delta.error` says why. It may be tried elsewhere."""
    REFUSED = "refused"
    """The worker took nothing on (draining, wrong phase); it may be tried elsewhere."""
    INVALID = "invalid"
    """The request itself is wrong (`Delta.error`); trying it elsewhere is no use."""


class _Message(
    msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, tag=True, gc=False
):
    pass


# ---------------------------------------------------------------- router to worker


class RouterHello(_Message, frozen=True):
    protocol: int
    router_id: str
    model_digest: str | None
    """The model that this router serves; None when the router has no weights to compare."""
    tokenizer_digest: str | None
    connection: int = 0
    """Counts the router's connections to this worker: with a higher one, its former are gone."""


class Generate(_Message, frozen=True):
    request_id: str
    """Unique over all routers, single use."""
    phase: Phase
    prompt_token_ids: list[int]
    max_tokens: int
    """At least 1. An upper bound for capacity; the engine's own limit is in `params`."""
    params: bytes
    """The engine's own encoding of everything else. Empty for the simulated engine."""
    ticket: bytes | None = None
    """Of the handoff: see the module. None for `Phase.BOTH`."""
    relay: bool = False
    """The prefill worker samples the first token as `params` ask, emits it, and hands it on with
    the KV; the decode worker emits it too, first of all, and goes on from there. Else the decode
    worker computes the prompt's last token itself, and the KV before it is handed over. The router
    says the same to both, and `relay` only where it changes no token that follows
    (docs/handoff.md)."""
    generated: int = 0
    """So many tokens at the prompt's end were generated before, elsewhere: they count for
    `params`' limits, and the client has them."""
    cache_salt: str | None = None
    lora_name: str | None = None
    priority: int = 0
    """Lower runs first, as in vLLM."""
    items: tuple[Item, ...] = ()
    """Images and the like in the prompt, by content hash and place."""
    contents: bytes = b""
    """The engine's own encoding of what the items are. A decode worker gets it too: see
    docs/handoff.md. Empty for the simulated engine."""


class Abort(_Message, frozen=True):
    """Stop these requests and free what they hold. Unknown ids are ignored; nothing answers."""

    request_ids: list[str]


class Release(_Message, frozen=True):
    """Give up the KV of finished prefills that nobody will read. Late or repeated is harmless."""

    tickets: list[bytes]


class Heartbeat(_Message, frozen=True):
    """I am here."""


class KvAsk(_Message, frozen=True):
    """Tell me all that is in the prefix cache, and from then on what changes."""


# ---------------------------------------------------------------- worker to router


class WorkerHello(_Message, frozen=True):
    protocol: int
    worker_id: str
    """Stable over restarts: the pod's or the process's name."""
    epoch: str
    """New at every start of the process."""
    role: Role
    engine: str
    """`vllm` or `sim`."""
    engine_version: str
    model: str
    model_digest: str
    """Weights and configuration (`workers.digests`)."""
    tokenizer_digest: str
    kv_digest: str
    """KV layout: dtype, block shape, layers, parallel sizes. Two workers with equal `kv_digest`
    can hand off to each other."""
    transports: list[str]
    """KV transports that it offers, best first; empty for a worker that can't hand off."""
    block_tokens: int
    """Tokens in one KV block."""
    block_bytes: int
    """Bytes of one KV block over all layers and ranks."""
    blocks_total: int
    max_model_len: int
    """Tokens, prompt and output together."""
    lease_s: float
    """How long it keeps a finished prefill's blocks."""
    handoff_endpoint: str = ""
    """Where its handles are followed; empty for a worker that makes its tickets itself."""
    tells_cache: bool = True
    """It says what its prefix cache holds; else nothing is known of it."""
    step_tokens: int = 0
    """Prompt tokens that one step computes at most; 0 when it does not say."""
    constraints: str = ""
    """How it constrains what it generates (`workers.constraints`); the router's front must have
    the same."""
    dp_rank: int = 0
    """Which of `dp_size` data-parallel ranks it is. They step together and share experts; each is
    a worker of its own, with its own requests and KV."""
    dp_size: int = 1
    message_bytes_max: int = MESSAGE_BYTES_MAX
    """The largest message that it takes or sends. A router that says more would lose it."""
    max_num_seqs: int = 0
    """Sequences that it runs at once; 0 when it does not say."""


class Refused(_Message, frozen=True):
    """The two can't speak; `reason` names both sides."""

    reason: str


class Delta(_Message, frozen=True):
    """What one engine step brought to one request. The last has `finish`."""

    request_id: str
    token_ids: list[int]
    finish: Finish | None = None
    stop_reason: int | str | None = None
    extras: bytes | None = None
    """The engine's own encoding of what accompanies the tokens (logprobs and the like)."""
    ticket: bytes | None = None
    """With `Finish.PREFILLED`."""
    cached_tokens: int | None = None
    """Prompt tokens not computed for this request because this worker's prefix cache held them.
    Sent once, with the first delta."""
    kv_tokens: int = 0
    """Prompt tokens whose KV was pulled from another worker; with the first delta."""
    kv_bytes: int = 0
    """Bytes pulled for them."""
    kv_s: float = 0.0
    """Seconds with a read in flight."""
    kv_hidden_s: float = 0.0
    """The part of them while the prompt was still being computed."""
    kv_transport: str = ""
    kv_mismatched: bool = False
    """The pull failed for its content: another prompt's blocks, or damaged ones."""
    kv_failed: str | None = None
    """Why a pull failed. The worker computed the prompt itself and went on."""
    error: str | None = None
    last_step: bool = False
    """Of a prefill, with nothing else: the step that completes the prompt has begun, or is next."""


class Step(_Message, frozen=True):
    """What one engine step computed, and how long it took: routers learn its rates from it."""

    seconds: float
    prefill_tokens: int = 0
    """Prompt tokens, and those computed again after a preemption."""
    prefill_pairs: int = 0
    """Of a prompt token that it computed and one that this attends to: itself or one before."""
    decodes: int = 0
    """Sequences that generated."""
    context_tokens: int = 0
    """Summed over those: the tokens that were there before."""


class Load(_Message, frozen=True):
    """What the worker holds at the end of a step."""

    steps: int
    """Engine steps since the start. Must move while `busy`."""
    busy: bool
    """Work is queued or running."""
    running: int
    waiting: int
    prefill_tokens_queued: int
    """Prompt tokens accepted and not yet computed."""
    blocks_free: int
    blocks_total: int
    leases_open: int
    """Finished prefills whose blocks are still kept."""
    draining: bool = False
    leases_expired: int = 0
    """Since the start: finished prefills that nobody fetched or released in time."""
    step: Step | None = None
    """Of `steps`, the last one; None when it computed nothing, or its time is not known."""


class KvStored(_Message, frozen=True):
    """Full blocks, each the next one's parent, are in the prefix cache now.

    Ids are the worker's own, small, and of one content for ever. What that is, a block's tokens
    and items say, and those of all its parents: no hash of the worker's is told.
    """

    ids: list[int]
    parent: int
    """The first one's; -1 for a prompt's first block."""
    token_ids: list[int]
    """`block_tokens` for each id."""
    salt: str | None = None
    lora: str | None = None
    items: tuple[Item, ...] = ()
    """As far as these blocks show them; offsets from the first one's first token."""


class KvRemoved(_Message, frozen=True):
    """These are in it no longer."""

    ids: list[int]


class KvCleared(_Message, frozen=True):
    """Nothing is."""


KvEvent = KvStored | KvRemoved | KvCleared


class KvSnapshot(_Message, frozen=True):
    """A part of all that is in the prefix cache: as if it had been stored since it was empty."""

    seq: int
    """Of the event that comes next, in a `Batch`."""
    part: int
    """From 0, without a gap."""
    last: bool
    events: list[KvEvent]


class Batch(_Message, frozen=True):
    load: Load
    deltas: list[Delta] = []
    heard: int = 0
    """How many `Generate`s of this router `load` accounts for, since it said hello."""
    kv_seq: int = 0
    """Of the first of `kv`."""
    kv: list[KvEvent] = []
    """None for a router that has not asked, or whose answer is under way."""


def make_ticket(sender: WorkerHello, handle: str) -> bytes | None:
    """For a prefill on this worker; None where it makes its tickets itself."""
    if not sender.handoff_endpoint:
        return None
    return kv.encode_ticket(sender.epoch, handle, sender.handoff_endpoint)


ToWorker = RouterHello | Generate | Abort | Release | Heartbeat | KvAsk
ToRouter = WorkerHello | Refused | Batch | KvSnapshot

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_router = msgspec.msgpack.Decoder(ToRouter).decode
