"""gosshd_py: an SSH shell server that one person can read in an hour.

The public face: `Config` says what to serve, `serve` serves it until it is told to stop.
"""

import sys

# structlog draws tracebacks by rich where that is there; ours are plain, and rich takes 40 ms of the
# start and 6 MiB. So in this moment it is not there. Whoever wants it imports structlog before us.
if not {"structlog", "rich"} & set(sys.modules):
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]

from .config import Config, ConfigError
from .daemon import serve
from .load import load_config
from .server import Server

__version__ = "0.1.0"

__all__ = ["Config", "ConfigError", "Server", "__version__", "load_config", "serve"]
