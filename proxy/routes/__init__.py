"""The HTTP handlers: OpenAI's endpoints, and what operators and load balancers ask."""
