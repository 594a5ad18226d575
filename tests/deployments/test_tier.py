"""The table of routes: which tier serves an operation, and which of its two processors. A wrong cell is a cold or a
drifting cache in production, so every cell is written out."""

from itertools import product

import pytest

from deployments.tier import Backend, Decision, Operation, Tier, Tiers, choose_tier
from renderer.errors import NotSupportedError

COUPLED: tuple[Backend, ...] = ("transformers", "vllm")
ENGINES: tuple[Backend, ...] = (*COUPLED, "remote")

GENERATION = {
    Operation.CHAT_COMPLETIONS: (False, True),
    Operation.COMPLETIONS: (False, True),
    Operation.GENERATE_PARTS: (False, True),
}
READONLY = {
    Operation.RENDER_CHAT: True,
    Operation.RENDER_COMPLETION: True,
    Operation.RENDER_TOKENS: True,
    Operation.LAYOUT: False,
    Operation.TOKENIZE: False,
}
NO_MEDIA = (Operation.DETOKENIZE, Operation.DERENDER)


@pytest.mark.parametrize(("operation", "engine", "render"), list(product(GENERATION, ENGINES, (True, False))))
def test_generation_runs_beside_the_engine_and_keeps_its_cache_unless_the_engine_is_remote(
    operation: Operation, engine: Backend, render: bool
) -> None:
    coupled, remote = GENERATION[operation]
    skip = remote if engine == "remote" else coupled
    assert choose_tier(operation, Tiers(render, engine)) == Decision(Tier.ENGINE, skip, pixels=True)


@pytest.mark.parametrize(("engine", "render"), list(product(ENGINES, (True, False))))
def test_generation_from_features_renders_nothing(engine: Backend, render: bool) -> None:
    expected = Decision(Tier.ENGINE, None, pixels=False)
    assert choose_tier(Operation.GENERATE_FEATURES, Tiers(render, engine)) == expected


@pytest.mark.parametrize(("operation", "engine"), list(product(READONLY, (*ENGINES, None))))
def test_a_render_only_operation_runs_on_the_render_tier_with_the_readonly_processor(
    operation: Operation, engine: Backend | None
) -> None:
    expected = Decision(Tier.RENDER, True, READONLY[operation])
    assert choose_tier(operation, Tiers(render=True, engine=engine)) == expected


@pytest.mark.parametrize(("operation", "engine", "full"), list(product(READONLY, ENGINES, (True, False))))
def test_without_a_render_tier_the_readonly_processor_beside_an_engine_serves(
    operation: Operation, engine: Backend, full: bool
) -> None:
    expected = Decision(Tier.ENGINE, True, READONLY[operation])
    assert choose_tier(operation, Tiers(render=False, engine=engine, render_full=full)) == expected


@pytest.mark.parametrize(("operation", "engine"), list(product(READONLY, ENGINES)))
def test_a_full_render_tier_overflows_to_the_readonly_processor_beside_an_engine(
    operation: Operation, engine: Backend
) -> None:
    expected = Decision(Tier.ENGINE, True, READONLY[operation])
    assert choose_tier(operation, Tiers(render=True, engine=engine, render_full=True)) == expected


@pytest.mark.parametrize("operation", READONLY)
def test_a_full_render_tier_without_an_engine_behind_it_keeps_its_requests(operation: Operation) -> None:
    assert choose_tier(operation, Tiers(render=True, engine=None, render_full=True)).tier is Tier.RENDER


@pytest.mark.parametrize(("operation", "engine", "render"), list(product(NO_MEDIA, (*ENGINES, None), (True, False))))
def test_detokenizing_has_no_media(operation: Operation, engine: Backend | None, render: bool) -> None:
    if not render and engine is None:
        with pytest.raises(NotSupportedError):
            choose_tier(operation, Tiers(render, engine))
    else:
        tier = Tier.RENDER if render else Tier.ENGINE
        assert choose_tier(operation, Tiers(render, engine)) == Decision(tier, None, pixels=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_borrowed_items_pass_the_processor_without_a_cache_since_the_callers_cache_decides(engine: Backend) -> None:
    expected = Decision(Tier.RENDER, engine == "remote", pixels=True)
    assert choose_tier(Operation.BORROWED, Tiers(render=True, engine=engine)) == expected


@pytest.mark.parametrize(
    ("operation", "render"), list(product((*GENERATION, Operation.GENERATE_FEATURES), (True, False)))
)
def test_generation_without_an_engine_says_so(operation: Operation, render: bool) -> None:
    with pytest.raises(NotSupportedError, match="no engine tier") as caught:
        choose_tier(operation, Tiers(render, engine=None))
    assert caught.value.status == 501


def test_every_operation_is_in_the_table() -> None:
    assert {*GENERATION, *READONLY, *NO_MEDIA, Operation.GENERATE_FEATURES, Operation.BORROWED} == set(Operation)
