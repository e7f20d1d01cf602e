"""What both ends of a KV transfer share; `context_worker` sends with it, `generation_worker` receives with it.

`transceiver.Transceiver` runs the two `halves` of a rank in a thread of its own, over the pool that
`layout.KvPoolView` describes. A half has four levels: all handoffs of a rank, one handoff, its share for one rank of
the peer, and the link to that rank. Both speak `wire` over a `connection`. Which rank sends what to whom is `routes`',
what goes into which message `pieces`'; `copies` are made between pool and `staging`, or from a pool that `peer_memory`
has mapped; `counters` count. `networks` carry the bytes; `ranks` makes one transceiver of all those of a worker.
"""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
