"""What a limit on cost does on the small world, over seeds."""
