"""gosshd_py: an SSH shell server that one person can read in an hour.

The public face: `Config` says what to serve, `serve` serves it until it is told to stop.
"""

from .config import Config, ConfigError
from .daemon import serve
from .load import load_config
from .server import Server

__version__ = "0.1.0"

__all__ = ["Config", "ConfigError", "Server", "__version__", "load_config", "serve"]
