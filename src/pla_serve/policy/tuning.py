"""Constants of `length-aware` that are no knobs, each with its unit and its reason.

They are shares and counts that hold for any machine, because seconds come from the cost model. An
experiment passes others: ``LengthAware(config, cost, Tuning(switch_margin=0.2))``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of `LengthAware`, grouped by what they decide."""

    # Decode steps in the batches of short prefills

    rider_share: float = 0.05
    """Most time of decode steps beside short prefills while longs wait, as a share of the shorts'.
    Contexts of streams may be documents; without a bound a short would wait for more reading than
    its own work is."""
    idle_rider_share: float = 0.5
    """The same bound while no long waits."""

    # Deadlines of tokens

    token_share: float = 1 / 7
    """Without a target in the settings, share of the time beside longs that streams take: with four
    of them on a machine where a token of theirs adds little, a token every ten idle steps or so."""
    token_steps: float = 3.0
    """Such a target is at least so many decode steps."""
    short_memory: float = 60.0
    """Seconds over which the rate of short prefills is averaged."""
    least_riding: int = 16
    """Fewest tokens of a chunk with streams in it, whatever a fit says."""

    # Order of long prefills

    switch_margin: float = 0.1
    """Share of its remaining time by which another long must undercut the one that has begun, so
    that two of about the same length do not take turns."""
    light_patience: float = 1 / 80
    """Share of the patience that counts among longs of much the same length: little more than
    arrival decides, because shortest-first gains nothing there and worsens the longest waits."""
    least_seen: int = 32
    """Long prefills before their spread is believed."""
    spread_memory: int = 1000
    """Prefills over which the spread is averaged: long enough for rare documents to be in it."""
    heavy: float = 0.6
    """Squared coefficient of variation of their times from which longs count as widely spread.
    Equal times have 0, exponential ones 1, recorded traffic with documents 3 to 8."""
    heavy_alone: float = 2.0
    """The same where nearly all requests are long: there the worst waits among longs are the worst
    waits of all, so more is asked for."""
    mostly: float = 0.99
    """Share of longs among requests from which on nearly all are long."""
    hysteresis: float = 0.85
    """Factor on the two thresholds once they are passed, so that the order does not flicker."""

    # Launches shared and batches nested

    most_mates: int = 16
    """Long prefills that share a launch: one more would save less than a sixteenth of it."""
    most_nested: int = 2
    """Long prefills that may run inside one another: each keeps the activations of its chunk."""

    # Chunks

    least_chunk: int = 256
    """Tokens. A fit that sees no cost of a launch must not cut prompts to pieces."""
    overhead: float = 0.02
    """Share of a chunk's time that may go to what every chunk costs anew: reading weights and
    history. Shorts do not wait for a chunk to end, so it may be long."""
    layer_share: float = 0.7
    """Longest layer of a chunk, as a share of the time of a typical short prompt alone. A short
    that arrives waits for half a layer on average."""
    typical_short: int = 64
    """Tokens of the prompt that `layer_share` is measured by: a chat turn."""
    overhead_for_layers: float = 0.05
    """Most overhead that the bound on a layer's time may bring; beyond it the chunk stays long."""
    stiff_share: float = 0.4
    """On a machine that cannot be interrupted: share of its spare time that may go to overhead of
    shorter chunks, since a short waits for the whole chunk there."""
    stiff_least: float = 0.05
    """Least overhead of a chunk on such a machine, even if it has no time to spare."""
    stiff_most: float = 0.1
    """Most overhead of a chunk on such a machine: longs hardly feel it."""
    load_memory: float = 1800.0
    """Seconds over which the offered load is averaged to tell how much time is to spare."""
