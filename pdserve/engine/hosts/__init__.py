"""What an engine lives in: a process of its own, or a thread of the caller's."""
