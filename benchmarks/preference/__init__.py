"""Preference objectives measured: what each targets, and effects declared beforehand."""
