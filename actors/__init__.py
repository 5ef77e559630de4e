"""The Ray runtime: sequence workers, level ranks, the exchange between them, and the conductor of a run."""

import os
from pathlib import Path

# A cluster that was started where there is a token asks for it, but Ray sends it only in this mode, which it reads when it is
# imported. A cluster without tokens does not mind. RAY_AUTH_MODE, where it is set, is left alone.
if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or (Path.home() / ".ray" / "auth_token").is_file():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
