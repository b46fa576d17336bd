"""The key that routers and their instances share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LINK_KEY_VARIABLE = "PLA_SERVE_LINK_KEY"


def find_link_key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The key in ``file``, else the one in the environment, or None.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no key in it.
    """
    if file is None:
        return environment.get(LINK_KEY_VARIABLE) or None
    key = file.read_text("utf-8").strip()
    if not key:
        raise ValueError(f"--link-key-file {file} is empty; write a long random text into it")
    return key
