"""Sampling from a policy: the engine protocol and the in-process engine."""
