"""How processes of the first release read messages: its schemas as they were. They are never changed."""
