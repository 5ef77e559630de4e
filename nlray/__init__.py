"""nlray: a distributed trainer for nested-learning models.

    import nlray

    run = nlray.train("tiny", run={"steps": 64})
    model, tokenizer = run.load_model()

The names below are imported on first use (`nlray.clusters.api`). The rest of this package is plain torch and never imports ray; the Ray
runtime is `nlray.actors`, the data `nlray.pipelines`, the command line `nlray.clusters`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = "nlray.clusters.api"
_LAZY = {
    "Config": "nlray.config",
    "NlrayError": "nlray.errors",
    "RunFailedError": "nlray.actors.faults",
    "UserError": "nlray.errors",
    "Run": _API,
    "attach": _API,
    "load": _API,
    "load_config": _API,
    "train": _API,
}
__all__ = ["Config", "NlrayError", "Run", "RunFailedError", "UserError", "attach", "load", "load_config", "train"]

if TYPE_CHECKING:
    from nlray.actors.faults import RunFailedError
    from nlray.clusters.api import Run, attach, load, load_config, train
    from nlray.config import Config
    from nlray.errors import NlrayError, UserError


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
