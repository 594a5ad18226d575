"""A short soak: the long one is `make soak`."""

from __future__ import annotations

import pytest
from rich.console import Console

from tests.faults.cluster import START_S, Deployed
from tests.faults.conftest import PATIENT, TIERS, TWO
from tests.soak.run import Plan, show, soak

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]


def test_mixed_requests_under_faults_are_all_answered_and_nothing_is_left_over(app: Deployed) -> None:
    console = Console()
    result = soak(app, PATIENT, dict.fromkeys(TIERS, TWO), Plan(requests=800, every_s=8, different=32), console)
    show(result, console)
    assert result.problems == []
    assert len(result.faults) > 3
