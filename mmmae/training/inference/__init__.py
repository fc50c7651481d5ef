"""Features and reconstructions by trained models."""
