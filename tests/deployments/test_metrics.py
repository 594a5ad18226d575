"""What is counted and how; `tests/stack/test_metrics.py` scrapes it."""

import asyncio
import re
from collections.abc import AsyncGenerator

import pytest
import yaml

from deployments.config import PROJECT
from deployments.error_response import status_of
from deployments.metrics import Growth, Metrics, measured
from engine.protocol import EngineOutput
from renderer.errors import AuthenticationError, OverloadedError


def test_a_total_counts_by_what_it_has_grown_and_from_nothing_once_it_has_begun_anew() -> None:
    growth = Growth()
    assert [growth.of(("hits", "sender"), total) for total in (0, 3, 3, 7, 2, 2)] == [0, 3, 0, 4, 2, 0]
    assert growth.of(("hits", "processor"), 5) == 5


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("full"), 503),
        (AuthenticationError("no key"), 401),
        (KeyError("fault"), 500),
        (asyncio.CancelledError(), 499),
        (GeneratorExit(), 499),
    ],
)
def test_an_outcome_is_counted_by_its_status(error: BaseException, status: int) -> None:
    assert status_of(error) == status


async def test_measured_outputs_are_the_outputs_and_a_reader_that_leaves_closes_them() -> None:
    closed = []

    async def source() -> AsyncGenerator[EngineOutput]:
        try:
            for token in range(3):
                yield EngineOutput((token,))
        finally:
            closed.append(True)

    assert [output.token_ids async for output in measured(source())] == [(0,), (1,), (2,)]
    outputs = measured(source())
    await anext(outputs)
    await outputs.aclose()
    assert closed == [True, True]


def test_every_alarm_is_about_a_metric_that_exists() -> None:
    names = {
        f"ray_{each._name.removesuffix('_total')}"
        for value in vars(Metrics()).values()
        for each in (value.values() if isinstance(value, dict) else [value])
    }
    (group,) = yaml.safe_load((PROJECT / "docs" / "cluster" / "alerts.yaml").read_text())["groups"]
    assert len(group["rules"]) > 5
    for rule in group["rules"]:
        used = re.findall(r"ray_\w+", rule["expr"])
        assert used
        assert {re.sub("_(total|bucket)$", "", name) for name in used} <= names, rule["alert"]


def test_the_docs_list_every_metric() -> None:
    text = (PROJECT / "docs" / "operations.md").read_text()
    listed = {
        f"{before}{name}{after}".removesuffix("_total")
        for before, names, after in re.findall(r"`(greenroom_\w*)(?:\{([\w,]+)\})?(\w*)`", text)
        for name in (names or "").split(",")
    }
    defined = {
        each._name.removesuffix("_total")
        for value in vars(Metrics()).values()
        for each in (value.values() if isinstance(value, dict) else [value])
    }
    assert defined <= listed
