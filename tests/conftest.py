"""Options and fixtures of the tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two share the cores

import pytest
import tiny


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


@pytest.fixture(scope="session")
def dataroot(tmp_path_factory):
    """A tiny data set, five pictures of A and four of B, that no test may change."""
    return tiny.draw_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def long(request):
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: add --long")
