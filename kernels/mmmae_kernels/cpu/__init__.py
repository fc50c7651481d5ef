"""The native CPU library: its loader, and the C++ that the ops share."""
