"""The decode role: an engine that receives KV and produces the rest of the tokens; it recomputes what it must evict."""
