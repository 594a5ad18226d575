"""Every error crosses a process border whole."""

import pickle

import pytest

from renderer import errors
from renderer.errors import GreenroomError, MediaError, OverloadedError, RequestError

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GreenroomError)]


def example(kind: type[GreenroomError]) -> GreenroomError:
    if issubclass(kind, MediaError):
        return kind("it is broken", 3, "messages.0")
    if issubclass(kind, OverloadedError):
        return kind("full", 7)
    return kind("what happened", "field")


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[GreenroomError]) -> None:
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_callers_fault_is_4xx_and_all_else_5xx(kind: type[GreenroomError]) -> None:
    assert (400 <= kind.status < 500) == issubclass(kind, RequestError)
    assert 400 <= kind.status < 600


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tree_at_the_top_of_the_file_lists_every_class_with_its_status(kind: type[GreenroomError]) -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if f"{kind.__name__} " in line]
    assert len(lines) == 1
    assert f" {kind.status}" in lines[0]


def test_a_media_error_names_the_item() -> None:
    assert str(MediaError("it is truncated", 2)) == "image 2: it is truncated"
