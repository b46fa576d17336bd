"""The published system, PLA-Serve (MLSys 2026, arXiv 2601.11589, also known as LAPS), as it was.

| step of the publication | here |
|---|---|
| latency model T(L, H) and boundary L_m | `latency`, fitted while serving by `boundary` |
| classification into Q_s and Q_l, mutual exclusion, temporal disaggregation | `policy` |
| captured shapes, padding to the nearest | `shapes.ladder.grid`, grouped by `levels` |
| AWD, adaptive wait-depth batching, in both modes | `awd` |
| long queue: one request at a time, chunks of C_l | `policy` |
| spatial disaggregation | `routing.strict_pools` |
| Algorithm 2, the instance-pressure controller | `pools.pressure` |

To run it: ``--policy pla-serve`` for an instance, and for a fleet ``--routing pla-serve
--controller pla-serve`` as well.
"""
