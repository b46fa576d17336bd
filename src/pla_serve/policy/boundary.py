"""Boundary between prefills bound by memory and launches, and prefills bound by compute."""

from __future__ import annotations

from math import inf, sqrt


def crossing(
    history: float, per_token: float, per_attention: float, per_kv: float, fixed: float
) -> float:
    """L at which the compute time of a lone prefill equals its memory and launch time.

    With L new tokens on H cached ones::

        compute(L, H) = per_token * L + per_attention * L * (H + L / 2)
        memory(L, H)  = fixed + per_kv * (H + L)

    Their difference is a quadratic in L with one root that is not negative. It is the boundary of
    the published model (PLA-Serve, arXiv 2601.11589) with alpha = per_attention / 2, the reading
    of the weights as a cost per launch rather than per token, and gamma_r = per_kv; like that one
    it tends to ``per_kv / per_attention`` as H grows.

    Args:
        history: H, tokens.
        per_token, per_attention, per_kv: seconds a token, a token-by-token product, a KV token.
        fixed: seconds for a batch of one request, however small.

    Returns:
        Tokens; infinite if compute never catches up.
    """
    a = per_attention / 2
    b = per_token + per_attention * history - per_kv
    d = fixed + per_kv * history
    root = sqrt(b * b + 4 * a * d)
    if b > 0:  # the two forms of the same root; each is exact where the other one cancels
        return 2 * d / (b + root)
    return (root - b) / (2 * a) if a > 0 else inf
