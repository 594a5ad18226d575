"""Going on with what another replica began, on engines that take prompts alone.

Such an engine has no place for output that it did not generate itself. Where the next token depends on the tokens
before it and on nothing else, the output so far is appended to the prompt. Where it depends on the state of a random
stream, of a grammar or of penalties, the request runs again from its beginning, and what is known is left out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from engine.protocol import EngineOutput, SamplingParams
from renderer.errors import EngineError


@dataclass(frozen=True, slots=True)
class Continuation:
    """What to ask of the engine.

    Attributes:
        appended: Output so far that becomes part of the prompt.
        repeated: Output so far that the engine generates again.
        params: What is left to do.
    """

    appended: tuple[int, ...]
    repeated: tuple[int, ...]
    params: SamplingParams


def plan_continuation(params: SamplingParams, prior_output_ids: Sequence[int]) -> Continuation:
    """How to go on after these tokens.

    Sampling without a seed goes on with random numbers of its own; presence and frequency penalties then count from
    here on.

    Raises:
        EngineError: The output follows a schema and was sampled without a seed: it cannot be generated again.
    """
    prior = tuple(prior_output_ids)
    is_random = params.temperature > 0
    is_repeatable = not is_random or params.seed is not None
    if not prior or not (_has_memory(params) or (is_random and params.seed is not None)):
        return _appended(params, prior)
    if is_repeatable:
        return Continuation((), prior, params)
    if params.structured is None:
        return _appended(params, prior)
    raise EngineError("sampled output that follows a schema can only be continued with a seed")


class Repetition:
    """Leaves what is known out of the outputs of a request that runs again."""

    def __init__(self, known: Sequence[int]) -> None:
        self._ahead = tuple(known)

    def feed(self, output: EngineOutput) -> EngineOutput | None:
        """What is new in an output; None where nothing is.

        Raises:
            EngineError: The engine generates something else than what is known.
        """
        count = min(len(self._ahead), len(output.token_ids))
        ends_early = output.finish_reason in ("stop", "length") and count < len(self._ahead)
        if output.token_ids[:count] != self._ahead[:count] or ends_early:
            raise EngineError("the engine does not generate again what another has streamed; the output cannot go on")
        self._ahead = self._ahead[count:]
        if count == len(output.token_ids) and output.finish_reason is None:
            return None
        return replace(output, token_ids=output.token_ids[count:], logprobs=output.logprobs[count:])


async def continued(
    params: SamplingParams,
    prior_output_ids: Sequence[int],
    run: Callable[[Continuation], AsyncGenerator[EngineOutput]],
) -> AsyncGenerator[EngineOutput]:
    """The outputs of a request after those that another replica has streamed.

    Args:
        run: Has the engine do it.

    Raises:
        EngineError: The output cannot go on.
    """
    if len(prior_output_ids) >= params.max_tokens:
        yield EngineOutput((), "length")
        return
    plan = plan_continuation(params, prior_output_ids)
    repetition = Repetition(plan.repeated)
    async with aclosing(run(plan)) as outputs:
        async for output in outputs:
            news = repetition.feed(output)
            if news is not None:
                yield news


def _has_memory(params: SamplingParams) -> bool:
    """Whether the next token depends on where the output began. The repetition penalty counts the prompt, too."""
    return params.structured is not None or params.presence_penalty != 0 or params.frequency_penalty != 0


def _appended(params: SamplingParams, prior: tuple[int, ...]) -> Continuation:
    left = params.max_tokens - len(prior)
    return Continuation(prior, (), replace(params, max_tokens=left, min_tokens=max(0, params.min_tokens - len(prior))))
