"""The native CPU library: its loader, and C++ code that the ops share."""
