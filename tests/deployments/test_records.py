import logging
import time

import pytest

from deployments.records import Record


def test_warm_up_and_the_first_request_are_written_down_once(caplog: pytest.LogCaptureFixture) -> None:
    record = Record("render")
    record.add_steps({"a": 0.5})
    record.add_steps({"b": 0.25})
    assert record.report().warmup_ended_at is None
    with caplog.at_level(logging.INFO, "ray.serve.greenroom"):
        record.warm()
    with record.request("render"):
        pass
    first = record.report()
    with record.request("render"), record.request("tokenize"):
        pass
    report = record.report()
    assert dict(report.warmup_s) == {"a": 0.5, "b": 0.25}
    assert report.warmup_ended_at is not None
    assert report.first_request_at is not None
    assert report.started_at <= report.warmup_ended_at <= report.first_request_at <= time.time()
    assert (report.first_request_at, report.first_request_s) == (first.first_request_at, first.first_request_s)
    assert report.requests == {"render": 2, "tokenize": 1}
    assert "render replica local is warm: a 0.500s, b 0.250s" in caplog.text


def test_a_request_that_fails_counts_too() -> None:
    record = Record("engine")
    with pytest.raises(ValueError, match="no"), record.request("generate"):
        raise ValueError("no")
    report = record.report()
    assert (report.requests, report.first_request_s) == ({"generate": 1}, None)
    with record.request("generate"), record.request("generate"):
        pass
    later = record.report()
    assert later.first_request_at == report.first_request_at, "it came, all the same"
    assert later.first_request_s is not None


def test_the_renderers_log_lines_reach_serves_logger() -> None:
    Record("render")
    parents, logger = [], logging.getLogger("greenroom.renderer")
    while logger.parent is not None:
        logger = logger.parent
        parents.append(logger.name)
    assert parents[:3] == ["greenroom", "ray.serve.greenroom", "ray.serve"]
