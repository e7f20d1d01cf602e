"""The decode role's half of a KV transfer: what only the receiver of KV does.

From many to one: `handoffs.Imports` are all handoffs of a rank, `handoff.Import` is one, `share.ImportShare` is what
one rank of the sender has of it, `link.ImportLink` joins this rank with that one. A share comes in messages
(`staged_share`), or is read out of the sender's pool (`direct_share`, `readable_pool`). `importer.Importer` is what an
engine calls.
"""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
