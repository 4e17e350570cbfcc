"""Published systems, a page each."""
