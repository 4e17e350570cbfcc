"""Side by side with peers: the same token ids, the same model, each side's own training loop, in processes of their own."""
