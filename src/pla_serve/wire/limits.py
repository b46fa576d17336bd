"""Ranges of what may stand in a message, as types for the fields of the structs.

A peer on a link is a program on another machine, so every number that it sends is checked where it
is decoded: times are finite, counts are not negative, lists have a bounded length. msgspec checks
an ``Annotated`` type while it decodes and names the field that is out of range; it does not check
structs that are made in this process.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MOST_TOKENS = 1 << 24
"""Tokens of one sequence: far beyond any context, and 128 MiB as a Python list."""
MOST_LOGPROBS = 20
"""Most likely tokens that may be asked for beside the chosen one, as in OpenAI's API."""
MOST_PROMPT_LOGPROBS = 300_000
"""Log probabilities that one prompt may be given: its tokens times one more than the likeliest
tokens that are wanted of each. They are one message of at most 2.4 MB."""
MOST_BIASES = 300
"""Entries of ``logit_bias``, as in OpenAI's API."""
MOST_STOP_IDS = 1024
MOST_TEXT = 1 << 20
"""Characters of a grammar, or of the reason for an error."""
MOST_OFFER_BYTES = 1 << 22
"""Bytes of the description of offered KV, which grows with the prompt (1 byte for 4 tokens)."""
GREEDY_BELOW = 1e-5
"""A lower temperature is greedy, as in vLLM: logits divided by it could overflow."""
MOST_LEASE_SECONDS = 3600.0
"""Longest time for which KV is kept for another instance that makes no progress."""

Seconds = Annotated[float, Meta(ge=-1e9, le=1e9)]
"""A moment on a monotonic clock, or its difference to another one. Finite."""
Duration = Annotated[float, Meta(ge=0, le=1e9)]
"""Seconds that something takes. Finite."""
Pace = Annotated[float, Meta(ge=1e-3, le=1e3)]
"""Seconds from one token to the next."""
Lease = Annotated[float, Meta(ge=0, le=MOST_LEASE_SECONDS)]
"""Seconds for which KV is kept for another instance."""
Ratio = Annotated[float, Meta(ge=0, le=1e18)]
Logprob = Annotated[float, Meta(le=1.0)]
"""Logarithm of a probability: at most 0 but for rounding, and minus infinity for no chance."""
MOST_NAMES = 4096
"""Entries of a table of counters by name."""
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenCount = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Meta(max_length=MOST_TOKENS)]
Id = Annotated[str, Meta(max_length=512)]
"""Id of a sequence. The instance's server puts a prefix of its own before a router's."""
Name = Annotated[str, Meta(max_length=1024)]
Text = Annotated[str, Meta(max_length=MOST_TEXT)]
Counts = Annotated[dict[Name, Count], Meta(max_length=MOST_NAMES)]
Ratios = Annotated[dict[Name, Ratio], Meta(max_length=MOST_NAMES)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
