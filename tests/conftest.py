"""Which tests start Ray: `make test` runs those one at a time, all others on every core. And Triton for its interpreter."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

# Triton's own functions are interpreted only where the variable is set when it is first imported, by whichever test.
os.environ["TRITON_INTERPRET"] = "1"
with suppress(ImportError):
    import triton  # noqa: F401
del os.environ["TRITON_INTERPRET"]

STARTS_RAY = ("actors", "clusters", "test_package.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in STARTS_RAY:
            item.add_marker(pytest.mark.ray)
