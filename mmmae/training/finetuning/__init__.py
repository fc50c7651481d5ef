"""Training an encoder with a head on labels."""
