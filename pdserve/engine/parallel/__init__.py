"""One model over several ranks: who holds what (`mapping`), and what they say to each other (`group`)."""
