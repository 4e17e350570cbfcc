"""Proofs on the small world that kinds of reward models do what they are for; ``PLAN.md`` was written before they were run."""
