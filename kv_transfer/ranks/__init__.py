"""The ranks of one worker: each has a transceiver over its own part of the cache, and rank 0 speaks for all.

The engine on rank 0 calls its exporter or importer as if there were one transceiver. `leader` passes each call on to
the followers and posts one ending event when every rank has ended; `follower` does as it is told, once its own engine
has launched the steps that the call relies on (`steps`). Calls and reports (`calls`) travel over a `relay`, which is
ZMQ between processes. A worker of one rank has `solo`, and no relay.
"""
