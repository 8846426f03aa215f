"""Flags and models of vLLM's that a worker does not serve, refused before an engine is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtransfer.refusal import Unserved

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs
    from vllm.config import ModelConfig

_GENERATION_ONLY: Final = "a worker serves generation only; run vLLM's own server for it"
_TENSOR: Final = "use --tensor-parallel-size"
_OURS: Final = "the worker sets it itself; leave it out"

_NEVER: Final[dict[str, str]] = {
    "ec_transfer_config": "encoders apart from their model are not served",
    "mm_encoder_only": "encoders apart from their model are not served",
    "enable_prompt_embeds": "prompts are handed on as tokens; leave it out and send text",
    "diffusion_config": "diffusion models compute their tokens in another order; "
    + _GENERATION_ONLY,
    "pooler_config": _GENERATION_ONLY,
    "worker_extension_cls": _OURS,
    "kv_transfer_config": (
        "the worker makes its own, and another's would be lost; see --kv-connector "
        "(tandem, nixl, none)"
    ),
    "kv_events_config": (
        "the worker takes the cache's events itself, for the router's prefix index; leave it out"
    ),
}
"""Fields of vLLM's arguments that must have their default, and what to do."""

_ONE: Final[dict[str, str]] = {
    "pipeline_parallel_size": "the KV of its stages can't be handed off; " + _TENSOR,
    "decode_context_parallel_size": "its ranks keep parts of a block; " + _TENSOR,
    "prefill_context_parallel_size": "its ranks keep parts of a prompt; " + _TENSOR,
}
"""Parallel sizes that must be 1, and what to do instead."""


_ONE_RANK: Final[dict[str, tuple[int | None, ...]]] = {
    "data_parallel_size_local": (None, 1),
    "data_parallel_start_rank": (None,),
    "data_parallel_hybrid_lb": (False,),
    "data_parallel_multi_port_external_lb": (False,),
    "enable_elastic_ep": (False,),
}
"""vLLM's ways to have several ranks, or a changing number of them, behind one front, with what
means none of that."""


def check_flags(args: AsyncEngineArgs, *, connector: str) -> None:
    """Raise `Unserved` for the first flag that a worker with this `--kv-connector` can't honour."""
    default = type(args)
    for name, advice in _NEVER.items():
        value = getattr(args, name)
        if value and value != getattr(default, name):
            raise Unserved(f"{_flag(name)} is not served: {advice}")
    for name, advice in _ONE.items():
        if (size := getattr(args, name)) > 1:
            raise Unserved(f"{_flag(name)} {size} is not served: {advice}")
    if args.runner == "pooling" or args.convert not in ("auto", "none"):
        name = "runner" if args.runner == "pooling" else "convert"
        raise Unserved(f"{_flag(name)} {getattr(args, name)} is not served: {_GENERATION_ONLY}")
    _check_data_parallel(args)
    if connector != "none" and args.kv_offloading_size:
        raise Unserved(
            f"--kv-offloading-size {args.kv_offloading_size:g}: it does not work beside "
            f"--kv-connector {connector}; leave it out, or start a mixed worker with "
            "--kv-connector none"
        )


def _check_data_parallel(args: AsyncEngineArgs) -> None:
    """A worker is one rank, as with vLLM's external load balancers: its router is one."""
    size, rank = args.data_parallel_size, args.data_parallel_rank
    if size > 1 and rank is None:
        raise Unserved(
            f"--data-parallel-size {size}: a worker is one rank; start {size} workers with "
            f"--data-parallel-rank 0 to {size - 1}, and rank 0's --data-parallel-address and "
            "--data-parallel-rpc-port"
        )
    if rank is not None and not 0 <= rank < size:
        raise Unserved(f"--data-parallel-rank {rank} is none of --data-parallel-size {size}")
    for name, meaningless in _ONE_RANK.items():
        if getattr(args, name) not in meaningless:
            raise Unserved(f"{_flag(name)} is not served: a worker is one rank of its own")
    if args.data_parallel_backend != "mp":
        raise Unserved(f"--data-parallel-backend {args.data_parallel_backend} is not served")


def check_model(model: ModelConfig, *, data_parallel_size: int) -> None:
    """Raise `Unserved` for a kind of model that no worker serves."""
    name = f"{model.model} ({', '.join(model.architectures)})"
    if model.runner_type != "generate":
        raise Unserved(f"{name} is a {model.runner_type} model: {_GENERATION_ONLY}")
    if model.is_encoder_decoder:
        raise Unserved(
            f"{name} is an encoder-decoder: the KV of its cross-attention can't be handed off; "
            "run vLLM's own server for it"
        )

    if data_parallel_size > 1 and not model.is_moe:
        raise Unserved(
            f"--data-parallel-size {data_parallel_size}: {name} has no experts that ranks could "
            "share; start the workers without it"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
