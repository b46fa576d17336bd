"""Prefills that are left between two layers: express steps run inside a long step.

- `executor.PreemptibleExecutor` is the switch, for ``--distributed-executor-backend``.
- `nesting.Nesting` is asked at each layer boundary of a long step, the outer one, and runs express
  steps there, the nested ones.
- `twin.make_twin` gives nested steps a model runner whose buffers are not those of the outer step.
- `outer.OuterStep` keeps the outer step's requests out of nested ones in the scheduler.
- `pace.HostPace` bounds how far the host enqueues layers before the device has run them.
- `refusals.why_not` names what this cannot work with.
"""
