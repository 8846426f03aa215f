"""A worker's step reaches clients, though some of its output makes no sense."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workers.api import Delta, Finish

pytestmark = [
    # Torch warns of its own deprecations while vLLM imports it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


class Front:
    """As much of the engine as delivers, with lists for what is behind it."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, list[int]]] = []
        self.failed: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.calls = 0
        self.plain_streams = SimpleNamespace(get=self._stream)
        self.output_processor = SimpleNamespace(process_outputs=self._process)
        self.dispatch = SimpleNamespace(enough=lambda ids: None, cancel=self.cancelled.extend)

    def deliver(self, deltas: list[Delta], prompt_extras: dict[str, bytes] | None = None) -> None:
        from router.engine import DisaggregatedEngine

        me: Any = self
        DisaggregatedEngine.deliver(me, deltas, prompt_extras or {})

    def _misread(self, request_ids: list[str], error: Exception) -> None:
        from router.engine import DisaggregatedEngine

        me: Any = self
        DisaggregatedEngine._misread(me, request_ids, error)

    def fail(self, request_id: str, error: Exception) -> None:
        self.failed[request_id] = str(error)

    def _stream(self, request_id: str) -> Any:
        if not request_id.startswith("plain"):
            return None

        def take(delta: Delta) -> bool:
            if "bad" in request_id:
                raise OverflowError("no such token")
            self.shown.append((request_id, delta.token_ids))
            return False

        return SimpleNamespace(take=take)

    def _process(self, outputs: list[Any], _: float) -> Any:
        self.calls += 1
        if any("nonsense" in output.request_id for output in outputs):
            raise IndexError("logprobs of nothing")
        self.shown += [(output.request_id, output.new_token_ids) for output in outputs]
        return SimpleNamespace(reqs_to_abort=[])


@pytest.mark.parametrize("extras", [b"", b"noise", b"\x91" * 100_000, b"\x91\xc4\x01\xc1"])
def test_extras_that_cannot_be_read_fail_their_own_request_alone(extras: bytes) -> None:
    front = Front()
    front.deliver([Delta("a", [1]), Delta("b", [2], extras=extras), Delta("c", [3])])
    assert front.shown == [("a", [1]), ("c", [3])]
    assert list(front.failed) == front.cancelled == ["b"]
    assert "not understood" in front.failed["b"]


def test_stream_that_cannot_be_written_fails_alone() -> None:
    front = Front()
    front.deliver([Delta("plain", [1]), Delta("plain-bad", [2]), Delta("plain-too", [3])])
    assert front.shown == [("plain", [1]), ("plain-too", [3])]
    assert list(front.failed) == ["plain-bad"]


def test_order_is_kept_and_what_vllm_cannot_process_fails_alone() -> None:
    import numpy as np
    from vllm.v1.engine import EngineCoreOutput

    from workers.vllm_codec import encode_extras

    extras = encode_extras(EngineCoreOutput("", [], routed_experts=np.zeros(2, dtype=np.int32)))
    front = Front()
    front.deliver(
        [
            Delta("a", [1]),
            Delta("b", [2], extras=extras),
            Delta("nonsense", [3], extras=extras),
            Delta("b", [4]),
            Delta("c", [5]),
            Delta("b", [6], Finish.STOP, extras=extras),
        ]
    )
    assert front.shown == [("a", [1]), ("b", [2]), ("b", [4]), ("c", [5]), ("b", [6])]
    assert list(front.failed) == ["nonsense"]
    assert front.calls == 5, "bare tokens are processed together"
