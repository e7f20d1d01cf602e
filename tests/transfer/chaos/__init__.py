"""Thousands of faults, drawn from a seed, and what must hold whatever they are.

`python -m tests.transfer.chaos` (`make chaos`) runs worlds one after the other until enough faults were injected. A
world is small and lives for some rounds: `world` joins transceivers of one process (one rank or several, alike or cut
up differently), `engines` whole engines over them, `processes` real processes over UCX. Each is drawn from (seed,
number) alone: `plan` says which handoffs there are, who meddles with them and which messages are spoiled, `script`
spoils them, `story` tells one handoff and checks it, `report` counts.
"""
