"""Waits of requests behind each other: M/G/1, first come, first served.

Poisson arrivals at rate lambda, one server, service times S that do not depend on the queue;
utilisation rho = lambda E[S]. The formulas are the head-of-line analysis of PLA-Serve (arXiv
2601.11589); the first of them is Pollaczek and Khinchine's. All times are seconds.
"""

from __future__ import annotations

from math import inf


def mean_wait(rate: float, mean_service: float, mean_square_service: float) -> float:
    """W = lambda E[S^2] / (2 (1 - rho)): mean seconds in the queue, service not included.

    Args:
        rate: lambda, arrivals a second.
        mean_service: E[S].
        mean_square_service: E[S^2], at least E[S]^2.

    Returns:
        Infinity if rho is 1 or more: the queue grows without end.

    Raises:
        ValueError: an argument is negative, or E[S^2] is below E[S]^2.
    """
    if rate < 0 or mean_service < 0:
        raise ValueError("rate and mean_service must not be negative")
    if mean_square_service < mean_service**2 * (1 - 1e-12):
        raise ValueError("mean_square_service must be at least mean_service squared")
    utilisation = rate * mean_service
    if utilisation >= 1:
        return inf
    return rate * mean_square_service / (2 * (1 - utilisation))


def mixed_wait(rate: float, short_share: float, short: float, long: float) -> float:
    """`mean_wait` where a share p of the requests takes ``short`` seconds, the others ``long``.

    Both classes wait alike, since nobody passes; so W / S is far greater for the short ones.

    Raises:
        ValueError: the share is not within 0..1, or a time or the rate is negative.
    """
    _check(rate, short_share, short, long)
    mean = short_share * short + (1 - short_share) * long
    return mean_wait(rate, mean, short_share * short**2 + (1 - short_share) * long**2)


def mixing_penalty(rate: float, short_share: float, short: float, long: float) -> float:
    """dW = lambda p (1 - p) (S_l - S_s)^2 / (2 (1 - rho)): the part of W that mixing causes.

    It is W of the mixture less W of equal requests with the same mean service, so that lambda and
    rho are the same on both sides; what is left without it is lambda E[S]^2 / (2 (1 - rho)).

    Args:
        rate: lambda, arrivals a second of both classes together.
        short_share: p.
        short: S_s, mean service of the short class.
        long: S_l, that of the long one.

    Returns:
        Seconds; infinity if rho is 1 or more and the classes differ.

    Raises:
        ValueError: the share is not within 0..1, or a time or the rate is negative.
    """
    _check(rate, short_share, short, long)
    between = short_share * (1 - short_share) * (long - short) ** 2
    if rate * between == 0:
        return 0.0
    utilisation = rate * (short_share * short + (1 - short_share) * long)
    return rate * between / (2 * (1 - utilisation)) if utilisation < 1 else inf


def _check(rate: float, short_share: float, short: float, long: float) -> None:
    if not 0 <= short_share <= 1:
        raise ValueError(f"short_share must lie between 0 and 1, not {short_share}")
    if rate < 0 or short < 0 or long < 0:
        raise ValueError("rate, short and long must not be negative")
