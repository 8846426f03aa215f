"""Plain vLLM's answers: one engine, one prompt at a time, no prefix cache.

`reference MODEL PROMPTS OUT ENGINE_ARGS`: prompts by name as JSON, answers to OUT in the same way.
With `"together": true` among the arguments all prompts are asked at once.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from tests.architectures.prompts import TOKENS


def main(argv: list[str]) -> int:
    from vllm import LLM, SamplingParams

    model, prompts, out, arguments = argv
    options: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
        "disable_log_stats": True, "seed": 0, **json.loads(arguments),
    }  # fmt: skip
    together = options.pop("together", False)
    engine = LLM(model, **options)
    # Two for each token: how far its rival was from it.
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    asked = json.loads(Path(prompts).read_text())
    batches = [list(asked)] if together else [[name] for name in asked]
    answered = [
        engine.generate([{"prompt_token_ids": asked[n]} for n in names], params, use_tqdm=False)
        for names in batches
    ]
    answers = {}
    for name, answer in zip(asked, itertools.chain(*answered), strict=True):
        [said] = answer.outputs
        best = [sorted((x.logprob for x in each.values()), reverse=True) for each in said.logprobs]
        answers[name] = {
            "tokens": list(said.token_ids),
            "logprobs": [
                each[token].logprob
                for token, each in zip(said.token_ids, said.logprobs, strict=True)
            ],
            "gaps": [first - second for first, second, *_ in best],
        }
    Path(out).write_text(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
