"""Live instances with the fake engine, in this process and in others."""

from __future__ import annotations
