"""What recipes that need only pairs of samples do on the small world, over seeds."""
