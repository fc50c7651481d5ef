"""The end of a run: tables on the terminal, and with times a JSON file and a page in `bench/results/`."""
