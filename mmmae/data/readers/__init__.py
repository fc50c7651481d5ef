"""Readers of raster and array files, as cubes with wavelengths."""
