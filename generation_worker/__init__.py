"""The decode role's half of a KV transfer: what only the receiver of KV does.

Four levels, from many to one: `handoffs.Imports` has all handoffs of a rank, `handoff.Import` is one of them,
`share.ImportShare` is what one rank of the sender has of it, and `link.ImportLink` is the link from that rank. A share
comes in messages (`staged_share`), or is read out of the sender's pool (`direct_share`, `readable_pool`). The engine
calls `importer.Importer`.
"""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
