"""File descriptors of this process: as many as the system grants, and some kept free."""

from __future__ import annotations

import sys

RESERVED = 64
"""Descriptors that no connection of a client may take: engines are started with these."""
MOST = 65_536
"""The limit is raised no further: every child of this process inherits it."""


def raise_limit() -> int:
    """Raise the soft limit on open files to the hard one; returns the limit that holds now."""
    if sys.platform == "win32":
        return MOST
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):  # a system with a bound of its own, such as macOS
            return int(soft)
        return wanted
    return MOST if soft == resource.RLIM_INFINITY else int(soft)
