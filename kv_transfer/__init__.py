"""The KV transceiver: `transceiver.Transceiver` over a pool that `layout.KvPoolView` describes.

Sending is `sender` (all exports) and `outbound` (a connection to one receiver); receiving is `receiver` (all imports),
`incoming` (one import) and `inbound` (a connection from one sender). Both speak `wire` over a `connection`, move blocks
with `mover` through `staging`, cut as `plan` says, and count in `counters`. Networks are in `backends`.
"""
