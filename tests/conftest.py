"""Options and fixtures of the tests."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: three share the cores


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


@pytest.fixture(scope="session")
def dataroot(tmp_path_factory):
    """A tiny data set, five pictures of A and four of B, that no test may change."""
    import tiny  # with torch, which only the processes that run tests need

    return tiny.draw_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def long(request):
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: add --long")
