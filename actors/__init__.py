"""The Ray runtime: sequence workers, level ranks, the exchange between them, and the conductor of a run."""

import os
import sys
from pathlib import Path

# A cluster that was started where there is a token asks for it, but Ray sends it only in this mode, which it reads when it is
# imported: a program that has imported Ray before has chosen. A cluster without tokens does not mind the mode.
_HAS_TOKEN = any(n in os.environ for n in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or (Path.home() / ".ray" / "auth_token").is_file()
if _HAS_TOKEN and "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
