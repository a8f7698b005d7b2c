"""Search in one's own images with one's own model: build an index, search it, and serve it as a page.

Imported on first use: the help of the command line needs none of torch and pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.search.commands import index, search, serve
    from aclip.search.store import Hit, Index

__all__ = ["Hit", "Index", "index", "search", "serve"]

_HOMES = {"index": "commands", "search": "commands", "serve": "commands", "Hit": "store", "Index": "store"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"aclip.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aclip.search' has no attribute '{name}'")
