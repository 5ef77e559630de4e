"""nlray: a distributed trainer for nested-learning models.

This package is plain torch and never imports ray; the Ray runtime is `nlray.actors`, the data `nlray.pipelines`, the
command line `nlray.clusters`.
"""

__version__ = "0.1.0"
