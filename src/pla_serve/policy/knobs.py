"""Reads ``name:knob=value:knob=value``, in which policies and routings are named."""

from __future__ import annotations

from collections.abc import Collection


def read_knobs(noun: str, text: str, known: Collection[str]) -> dict[str, str]:
    """The values behind the name, as they are written; ``-`` and ``_`` are the same in a knob.

    Args:
        noun: what is named, for messages: policy or routing.
        known: the knobs that it has.

    Raises:
        ValueError: an entry has no value, or names a knob that is not known or was named before.
    """
    name, *entries = text.split(":")
    knobs: dict[str, str] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"{entry!r} in {noun} {text!r} is not of the form knob=value")
        if key not in known:
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{noun} {name} has no knob {key!r}; {has}")
        if key in knobs:
            raise ValueError(f"knob {key} is given twice in {noun} {text!r}")
        knobs[key] = value.strip()
    return knobs
