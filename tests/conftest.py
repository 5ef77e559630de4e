"""Which tests start Ray: `make test` runs those one at a time, all others on every core."""

from pathlib import Path

import pytest

STARTS_RAY = ("actors", "clusters", "test_package.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in STARTS_RAY:
            item.add_marker(pytest.mark.ray)
