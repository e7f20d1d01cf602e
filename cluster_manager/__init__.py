"""The cluster manager: who is alive, told over REST, kept in a store under leases."""
