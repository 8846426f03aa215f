"""vLLM's OpenAI front over an engine that answers at once: what the router is measured against.

    python -m deploy.local.bare_front --model FOLDER --address-file F [any flag of vLLM's server]

It is vLLM's own application on uvicorn and uvloop as its server runs it, with nothing behind it:
no engine process, no scheduler, no detokenizing (the tokens' text is constant). A router can't be
cheaper than this and still speak vLLM's API; the difference is what the router adds.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from vllm.outputs import CompletionOutput, RequestOutput

from deploy.local.vllm_front import FrontEngine, serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vllm.sampling_params import SamplingParams

_TOKEN_ID, _TEXT = 253, " a"


class InstantEngine(FrontEngine):
    """Every token costs one turn of the event loop."""

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        count = sampling_params.max_tokens or 1
        prompt_token_ids = prompt["prompt_token_ids"]
        for n in range(1, count + 1):
            await asyncio.sleep(0)
            output = CompletionOutput(
                index=0, text=_TEXT, token_ids=[_TOKEN_ID], cumulative_logprob=None,
                logprobs=None, finish_reason="length" if n == count else None,
            )  # fmt: skip
            yield RequestOutput(
                request_id, prompt.get("prompt"), prompt_token_ids, None, [output], n == count
            )


def main() -> None:
    """Serve on a free port of 127.0.0.1 until SIGTERM."""
    serve("bare_front", sys.argv[1:], InstantEngine)


if __name__ == "__main__":
    main()
