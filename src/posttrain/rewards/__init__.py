"""Rewards: anything that scores whole groups of responses; models, Python functions, and sums of them."""
