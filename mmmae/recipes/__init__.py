"""The former place of what is in `mmmae.training` now; programs that import labels or samplers by it go on working."""
