"""What each stage does; loaded when a stage runs."""
