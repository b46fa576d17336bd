"""Builds an engine in stages, each a frozen value that is made only from the ones before it.

Every rank builds (see `rank.build_rank`)::

    settings   config, model source, device and dtype     RankSettings
    model      loaded, checked and fused modules          RankModel
    memory     how many KV blocks there are               RankMemory
    device     uploads, run-ahead, measured cost          RankDevice
    execution  attention, KV cache, captured shapes       Execution

Rank 0, which serves requests, goes on (see `engine.build_engine`)::

    sampling   limits of requests, and the sampler        Sampling
    scheduling policy, cost model, admission bounds       Scheduling
    engine     collaborators of the loop                  EngineParts
"""
