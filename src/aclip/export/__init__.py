"""Handing a model to other tools, in their own formats."""

from aclip.export import open_clip

__all__ = ["open_clip"]
