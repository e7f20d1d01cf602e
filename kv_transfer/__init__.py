"""The KV transceiver: `transceiver.Transceiver` over a rank's pool, which `layout.KvPoolView` describes.

Sending is `sender` (all exports), `outgoing` (one), `push` (one export's share for one receiver rank) and `outbound` (a
connection to it). Receiving is `receiver` (all imports), `incoming` (one), `pull` (one import's share from one sender
rank) and `inbound` (a connection from it). Both speak `wire` over a `connection`. Which rank sends what to whom is
`reshard`'s, what goes into which message `plan`'s; `mover` copies between pool and `staging`; `counters` count.
Networks are in `backends`; `ranks` makes one transceiver of all those of a worker.
"""
