"""Grammars that bind output: compiled and followed in processes of their own, never elsewhere.

A grammar comes from a client, and the library that compiles it can overflow its stack, take all
memory or compute without end. So its code runs only in *workers*: children that have limits and
can be killed. `compiler` and `worker` run there; `nursery` forks them; `host` is the side of the
process that uses them. Only these modules may import llguidance.
"""
