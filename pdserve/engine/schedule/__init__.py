"""What runs next, and what holds whose KV: requests, queues, capacity, blocks, the prefix cache. Without torch."""
