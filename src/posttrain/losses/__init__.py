"""Losses and advantage estimators: pure functions of tensors, unreduced; keyword-only floats are their configuration."""
