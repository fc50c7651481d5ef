"""Readers of files: rasters, containers and arrays as cubes with wavelengths."""
