"""The prefill role's half of a KV transfer: what only the sender of KV does.

From many to one: `handoffs.Exports` are all handoffs of a rank, `handoff.Export` is one, `share.ExportShare` is what
one rank of the receiver gets of it, `link.ExportLink` joins this rank with that one. `exporter.Exporter` is what an
engine calls.
"""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
