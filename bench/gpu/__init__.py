"""One command for every visit to a machine with a GPU: what is broken there, and what is slow."""
