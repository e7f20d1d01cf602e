"""The OpenAI-compatible front of a cluster.

`endpoints` is the table of what is served and `schemas` its shapes, `intake` the way from a body to a job, `job` the
choices of a request, `generation` one choice's life across its attempts, `fleet` the workers' sockets and who gets
what, `routes` the HTTP handlers and answers, `openapi` the API's description, `server` the process. Nothing here
touches a model: workers speak tokens, the proxy speaks text.
"""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
