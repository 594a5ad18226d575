"""What engines do around every request that another program computes, one that takes prompts alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from engine.continuation import Continuation, continued
from engine.limits import check_request
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from engine.requests import Aborted, Requests, UnderWay
from renderer.prompt import RenderedPrompt

Run = Callable[[Continuation, UnderWay], AsyncGenerator[EngineOutput]]


class Relay:
    """An engine's requests and counters.

    Args:
        limit: Tokens of prompt and output together that the other program holds; raises where it is not up.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self.requests = Requests()
        self.counters = EngineStats()
        self._limit = limit

    def count(self, **more: int) -> None:
        """Add to counters, by name."""
        sums = {name: getattr(self.counters, name) + value for name, value in more.items()}
        self.counters = replace(self.counters, **sums)

    async def generate(
        self, prompt: RenderedPrompt, params: SamplingParams, request_id: str, prior: Sequence[int], run: Run
    ) -> AsyncGenerator[EngineOutput]:
        """See `engine.protocol.Engine`: an abort finds the request from here on, and its end is where its lease ends.

        Args:
            prior: Tokens that another replica has streamed; see `engine.continuation`.
            run: Has the other program do what is left to do.
        """
        try:
            check_request(prompt, params, self._limit())
            self.count(requests=1, prompt_tokens=len(prompt.token_ids))
            with self.requests.under_way(request_id) as request:
                async with aclosing(continued(params, prior, lambda plan: run(plan, request))) as outputs:
                    async for output in outputs:
                        self.count(output_tokens=len(output.token_ids))
                        yield output
        except Aborted:
            self.count(aborted=1)
            yield EngineOutput((), "abort")
        finally:
            if prompt.lease is not None:
                prompt.lease.close()
