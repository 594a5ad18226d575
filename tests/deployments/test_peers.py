"""How routers that share nothing but the list of each other divide what they have together."""

import pytest

from deployments.admission import Share
from deployments.peers import share_of


@pytest.mark.parametrize(
    ("own", "running", "share"),
    [
        ("a", "", Share(0, 1)),  # it has been told of nobody
        ("a", "a", Share(0, 1)),
        ("b", "abc", Share(1, 3)),
        ("d", "abc", Share(3, 4)),  # it starts: the others do not know of it yet
        ("a", "c", Share(0, 2)),
    ],
)
def test_a_share_counts_the_replica_itself_and_those_that_run(own: str, running: str, share: Share) -> None:
    assert share_of(own, frozenset(running)) == share


def test_every_replica_finds_another_place() -> None:
    names = frozenset("wxyz")
    assert sorted(share_of(name, names).place for name in names) == [0, 1, 2, 3]
