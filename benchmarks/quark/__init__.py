"""What Quark's tokens do on the small world, over seeds."""
