import pytest

from demo.evaluate import Demo


@pytest.fixture(scope="session")
def demo() -> Demo:
    return Demo.load()
