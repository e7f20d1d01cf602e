"""The OpenAI-compatible front of a cluster.

`text` turns text into tokens and back, `schemas` is the API's shape, `fleet` the workers' sockets and who gets what,
`generation` one choice's life across its attempts, `routes` the HTTP handlers, `server` the process. Nothing here
touches a model: workers speak tokens, the proxy speaks text.
"""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
