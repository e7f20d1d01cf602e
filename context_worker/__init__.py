"""The prefill role's half of a KV transfer: what only the sender of KV does.

Four levels, from many to one: `handoffs.Exports` has all handoffs of a rank, `handoff.Export` is one of them,
`share.ExportShare` is what one rank of the receiver gets of it, and `link.ExportLink` is the link to that rank. The
engine calls `exporter.Exporter`.
"""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
