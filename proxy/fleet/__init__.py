"""The workers as the proxy knows them: their sockets, their load, and who gets the next request."""
