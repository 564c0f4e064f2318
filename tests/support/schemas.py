"""The schemas of the commands' JSON, as they come with the package."""

from __future__ import annotations

from edge_speq.schema import load as schema

__all__ = ["schema"]
