"""The cluster manager: who is alive, told over REST, kept in a store under leases."""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
