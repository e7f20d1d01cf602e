"""The workers as the proxy knows them: who they are, their sockets, their load, and who gets the next request."""
