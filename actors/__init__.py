"""The Ray runtime: sequence workers, level ranks, the exchange between them, and the conductor of a run."""

import os
import secrets
import sys

# A cluster that was started where there is a token asks for it, but Ray sends it only in this mode, which it reads when it is
# imported: a program that has imported Ray before has chosen. A cluster without tokens does not mind the mode.
_HOME = os.path.expanduser("~")
_HAS_TOKEN = any(n in os.environ for n in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or os.path.isfile(f"{_HOME}/.ray/auth_token")
if not _HAS_TOKEN and not (os.path.isabs(_HOME) and os.access(_HOME, os.W_OK)):
    # Ray would fail to write a new one below the home folder: in a container the user id may have none, or may not write to it.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _HAS_TOKEN = True
if _HAS_TOKEN and "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
