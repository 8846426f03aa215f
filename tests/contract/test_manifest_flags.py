"""The flags in `deploy/k8s` that are vLLM's own, asked of vLLM's own parsers."""

from __future__ import annotations

import json
import os
from unittest import mock

import pytest

from kvtransfer.transports.choose import PREFERRED
from tests.manifests import K8S, KUBECTL, build, pods
from workers.flags import read_settings
from workers.settings import WorkerSettings

pytestmark = [
    pytest.mark.skipif(KUBECTL is None, reason="no kubectl on PATH"),
    # Torch's, while vLLM imports it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

OVERLAYS = sorted(p.name for p in (K8S / "overlays").iterdir())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_vllm_takes_every_flag_that_is_not_ours(overlay: str) -> None:
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from router.front import front_args
    from workers.engines.vllm_config import _KV_ROLES

    model = str(K8S)  # Any folder: offline, a name would be looked for.
    engine = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    for pod in pods(build(K8S / "overlays" / overlay)):
        command, *flags = pod.args()
        if command == "worker":
            with mock.patch.dict(os.environ, pod.environment(), clear=True):
                _, rest = read_settings(WorkerSettings, flags, prog="tandem worker", description="")
            AsyncEngineArgs.from_cli_args(engine.parse_args(["--model", model, *rest]))
        elif command == "router":
            assert front_args(model, [f for f in flags if f.startswith("--served-")])
        else:
            # What follows a leader: its ranks are told what the leader's are.
            assert (pod.container["command"], command) == (["vllm"], "serve")
            args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
            assert args.headless
            assert args.node_rank > 0
            transfer = json.loads(pod.flag("--kv-transfer-config"))
            assert transfer["kv_role"] == _KV_ROLES[pod.role]
            assert transfer["kv_connector_extra_config"]["host"] == "10.1.2.3"
            assert set(transfer["kv_connector_extra_config"]["transports"].split(",")) <= set(
                PREFERRED
            )
