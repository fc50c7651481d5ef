"""Features and reconstructions of trained models."""
