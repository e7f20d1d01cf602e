"""What context and generation workers share: the server process, its engine process, membership, metrics."""
