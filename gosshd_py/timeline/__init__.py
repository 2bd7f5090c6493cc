"""A trace drawn over time: a page to explore, live or not, and a picture for slides.

The model is made once, in model.py; page.js and svg.py draw it.
"""

from .follow import Server, Watcher
from .model import Connection, Model, Read
from .page import page
from .svg import svg

__all__ = ["Connection", "Model", "Read", "Server", "Watcher", "page", "svg"]
