"""Policies decide what an engine runs next: numbers and the time in, decisions out.

Nothing here imports torch, does I/O, reads a clock or draws a random number, so the same objects
drive the engine, the simulator, the router and vLLM. Start with these four files:

| to see | read |
|---|---|
| the contract between a policy and an engine | `protocol` |
| the simplest policy | `baselines.fcfs`, and `baselines.continuous` below it |
| the project's own policy | `length_aware`, with its constants in `tuning` |
| what all share: requests, batches, orders, decoding | `book`, `assemble`, `queues`, `decodes` |

Around them:

- *Seconds*: `cost` predicts a batch's time and `fit` its coefficients; `boundary` derives L_m;
  `calibration` corrects predicted waits by earlier ones.
- *Order and bounds*: `longs` orders long prefills, `chunking` cuts them, `fairness` bounds every
  wait, `express` and `waiting` hold shorts back where that pays, `tenants` shares the device
  between API keys, `admission` refuses what cannot be served in time.
- *Names and knobs*: `declare`, `knobs`, `registry`; docs/write-a-policy.md.
- *Others*: `baselines` are policies of other systems, `published` is the published PLA-Serve,
  `shapes` chooses captured shapes, `routing` picks an instance, `pools` sizes pools of instances,
  `steps` drives a policy inside an engine that cannot be interrupted.
"""
