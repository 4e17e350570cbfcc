"""Models: finding and loading, shared-prompt attention, output and scalar heads, LoRA roles on one base."""
