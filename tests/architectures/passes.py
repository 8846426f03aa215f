"""The questions that a running group is asked, in passes, and what came back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx

from tests.architectures.compare import Answer
from tests.architectures.prompts import PROMPTS, TOGETHER, TOKENS
from tests.asking import await_free

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.forks import ForkedGroup

ANSWER_S = 120.0
FREE_S = 60.0
ROUND_TOKENS = 8
"""Output tokens in rounds: a wrong KV block shows in the first."""

ONE_BY_ONE, CACHED, SALTED, KILLED = "one by one", "together, cached", "together, salted", "killed"


@dataclass(slots=True)
class Passes:
    """Answers by pass and prompt."""

    answers: dict[str, dict[str, Answer]] = field(default_factory=dict)
    rounds: list[dict[str, Answer]] = field(default_factory=list)
    kept: str | None = None
    """Blocks and leases by worker, where some were not free again after all that."""


def run_passes(group: ForkedGroup, model: str, rounds: int, done: Passes) -> None:
    """Ask `group`, which serves `model`, all there is, and note it in `done`.

    One by one, cold, with logprobs; all together, cached, without them, so that the router relays
    the first token; all together under a salt, with them; `rounds` rounds of thirteen, each under
    a salt of its own; then all together while a prefill worker dies. Raises `PartDied` when a
    process dies by itself.
    """
    with _Asker(group, model) as asker:
        _ask_all(asker, group, rounds, done)


def _ask_all(asker: _Asker, group: ForkedGroup, rounds: int, done: Passes) -> None:
    cold = done.answers[ONE_BY_ONE] = {}
    for name in PROMPTS:
        cold[name] = asker.ask(name, logprobs=1)
        group.check()
    done.answers[CACHED] = asker.together(PROMPTS)
    done.answers[SALTED] = asker.together(PROMPTS, logprobs=1, cache_salt="salted")
    group.check()
    for number in range(rounds):
        asked = {"cache_salt": f"round {number}", "max_tokens": ROUND_TOKENS, "logprobs": 1}
        done.rounds.append(asker.together(TOGETHER, **asked))
        group.check()
    try:
        await_free(group, FREE_S)
    except AssertionError as kept:
        done.kept = str(kept)
    done.answers[KILLED] = asker.while_one_dies(PROMPTS, "prefill-0")


class _Asker:
    def __init__(self, group: ForkedGroup, model: str) -> None:
        self._group = group
        self._model = model
        # A connection that is kept may be closed by the server just as it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(base_url=group.url, timeout=ANSWER_S, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def ask(self, name: str, **options: Any) -> Answer:
        body = {
            "model": self._model, "prompt": PROMPTS[name], "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **options,
        }  # fmt: skip
        try:
            response = self._http.post("/v1/completions", json=body)
            if response.status_code != 200:
                return Answer(error=f"{response.status_code} {response.text[:300]}")
            said = response.json()
            [record] = self._http.get(f"/tandem/requests/{said['id']}").json()
        except httpx.TransportError as error:
            return Answer(error=f"{type(error).__name__}: {error}")
        [choice] = said["choices"]
        logprobs = choice["logprobs"] and choice["logprobs"]["token_logprobs"]
        details = said["usage"]["prompt_tokens_details"] or {}
        cached = details.get("cached_tokens", 0)
        return Answer(choice["token_ids"], logprobs, cached, record)

    def together(self, names: Iterable[str], **options: Any) -> dict[str, Answer]:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            asked = {name: pool.submit(self.ask, name, **options) for name in names}
            return {name: answer.result() for name, answer in asked.items()}

    def while_one_dies(self, names: Iterable[str], worker: str) -> dict[str, Answer]:
        """Killed once the first answer is there: the others are at every stage then."""
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            asked = {name: pool.submit(self.ask, name, cache_salt="killed") for name in names}
            next(as_completed(asked.values()))
            self._group.worker(worker).kill()
            return {name: answer.result() for name, answer in asked.items()}
