"""Where people meet a trained model: the chat."""
