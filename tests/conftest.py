"""Which tests start Ray: `make test` runs those two files at a time, all others on every core. And Triton for its interpreter."""

import os
from contextlib import suppress

import pytest

# Triton's own functions are interpreted only where the variable is set when it is first imported, by whichever test.
os.environ["TRITON_INTERPRET"] = "1"
with suppress(ImportError):
    import triton  # noqa: F401
del os.environ["TRITON_INTERPRET"]

RAY_FIXTURES = {"cluster", "installed", "live", "nodes", "start"}
"""Fixtures that start Ray, or a process that does; a test that starts it by itself has the marker `ray`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if RAY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
