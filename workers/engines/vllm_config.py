"""vLLM's configuration for one worker, from its own flags and ours."""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

from kvtransfer.refusal import Unserved
from workers.engines.vllm_served import check_flags, check_model
from workers.flags import config_apart

if TYPE_CHECKING:
    import argparse

    from vllm import AsyncEngineArgs
    from vllm.config import KVTransferConfig, VllmConfig

    from workers.server import Identity

EXTENSION: Final = "workers.engines.vllm_worker_process.WorkerExtension"
"""By name: vLLM's processes import it, and this one need not."""
_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "mixed": "kv_both"}


def vllm_config(args: argparse.Namespace, identity: Identity, flags: list[str]) -> VllmConfig:
    """Parse the flags left over as vLLM's own; a bad one ends the process as argparse does.

    Raises `Unserved`, and whatever vLLM raises for what it can't do itself.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Events with whole hashes: our connector looks them up in the cache that they are of.
    os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = "0"
    from vllm.config import KVEventsConfig

    engine_args = parsed(args.model, flags)
    check_flags(engine_args, connector=args.kv_connector)
    model = engine_args.create_model_config()
    check_model(model, data_parallel_size=engine_args.data_parallel_size)
    if model.has_inner_state:
        _no_cached_states_on_cpu(engine_args)
    if args.kv_connector != "none":
        engine_args.kv_transfer_config = _transfer(args, identity)
    elif args.role != "mixed":
        raise Unserved("--kv-connector none: only a mixed worker can do without a handoff")
    if args.kv_connector == "tandem":
        # Our connector takes them itself; nothing is published.
        engine_args.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    # Routers send every item whole, since no router knows what an engine has seen: a cache of them
    # here would take gigabytes and never be asked.
    engine_args.mm_processor_cache_gb = 0
    engine_args.worker_extension_cls = EXTENSION
    return engine_args.create_engine_config()


def _no_cached_states_on_cpu(engine_args: AsyncEngineArgs) -> None:
    """Leave the prefix cache of a model with states (Mamba) off, on a CPU.

    vLLM 0.32 has it on by default. Its CPU kernels keep no checkpoints of states inside a step, and
    the engine dies of the first prompt that wants one.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if engine_args.enable_prefix_caching:
        raise Unserved(
            "--enable-prefix-caching: vLLM's CPU kernels can't keep a Mamba model's states for it; "
            "leave it out"
        )
    engine_args.enable_prefix_caching = False


def parsed(model: str, flags: list[str]) -> AsyncEngineArgs:
    from vllm import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            """One line: vLLM's usage would be some hundred."""
            sys.stderr.write(f"{self.prog}: {message}\n")
            raise SystemExit(2)

    parser = AsyncEngineArgs.add_cli_args(Parser(prog="tandem worker"))
    # vLLM's default policy ignores priorities without a word.
    parser.set_defaults(model=model, scheduling_policy="priority")
    given = ["--model", model, *config_apart(flags)]
    return AsyncEngineArgs.from_cli_args(parser.parse_args(given))


def _transfer(args: argparse.Namespace, identity: Identity) -> KVTransferConfig:
    from vllm.config import KVTransferConfig

    if args.kv_connector == "nixl":
        from vllm.platforms import current_platform

        os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", args.host)
        os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_PORT", str(_free_port(args.host)))
        return KVTransferConfig(
            kv_connector="NixlConnector",
            kv_role="kv_both",
            kv_buffer_device=current_platform.device_type,
            kv_load_failure_policy="recompute",
        )
    extra: dict[str, Any] = {
        "host": args.host,
        "epoch": identity.epoch,
        "model_digest": identity.model_digest,
        "tokenizer_digest": identity.tokenizer_digest,
        "lease_s": args.lease_s,
        "checksums": args.kv_checksums,
        "transports": args.kv_transports,
        "answer_timeout_s": args.kv_answer_s,
        "read_timeout_s": args.kv_read_s,
        # Its name and not its content: vLLM logs all of this.
        "curve_secret_file": args.curve_secret_file,
    }
    return KVTransferConfig(
        kv_connector="TandemConnector",
        kv_connector_module_path="kvtransfer.vllm_connector",
        kv_role=_KV_ROLES[args.role],
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
