import inspect
import json
import pickle

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.error_response import error_event, error_response, translate
from renderer import errors
from renderer.errors import GreenroomError, MediaError, OverloadedError, RequestError

OURS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GreenroomError)]


def instance(kind: type[GreenroomError]) -> GreenroomError:
    if issubclass(kind, MediaError):
        return kind("broken", 2)
    if issubclass(kind, OverloadedError):
        return kind("full", 7)
    return kind("what happened")


def over_a_hop(error: Exception) -> RayTaskError:
    """As Ray brings it to the caller by reference."""
    task_error = RayTaskError("f", "Traceback: /secret/path", error).as_instanceof_cause()
    assert isinstance(task_error, RayTaskError)
    return task_error


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_our_errors_are_answered_alike_by_value_and_by_reference(kind: type[GreenroomError]) -> None:
    error = instance(kind)
    by_value, by_reference = pickle.loads(pickle.dumps(error)), over_a_hop(error)
    expected = {"message": str(error), "type": kind.type, "param": error.param, "code": kind.status}
    for carried in (error, by_value, by_reference):
        response = error_response(carried)
        assert response.status_code == kind.status
        assert json.loads(bytes(response.body)) == {"error": expected}


def test_what_a_foreign_error_says_stays_on_the_server() -> None:
    for error in (ValueError("/secret/path"), over_a_hop(KeyError("/secret/path")), RuntimeError("10.0.0.7")):
        response = error_response(error)
        assert response.status_code == 500
        assert b"secret" not in bytes(response.body)
        assert b"10.0.0.7" not in bytes(response.body)


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (OverloadedError("full", 7), "7"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), "1"),
        (DeploymentUnavailableError(None), "5"),
        (ActorDiedError(), "1"),
    ],
)
def test_what_passes_by_waiting_says_how_long(error: Exception, retry_after: str) -> None:
    response = error_response(error, {"X-Greenroom-Tier": "router"})
    assert (response.status_code, response.headers["retry-after"]) == (503, retry_after)
    assert response.headers["x-greenroom-tier"] == "router"


def test_an_error_in_a_stream_is_its_last_event() -> None:
    event = error_event(over_a_hop(RequestError("no", "field")))
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["param"] == "field"


def test_the_cause_of_a_remote_error_is_what_is_translated() -> None:
    error = MediaError("broken", 3)
    assert translate(over_a_hop(error)) == error
