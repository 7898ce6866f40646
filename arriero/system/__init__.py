"""Worker processes, and C++ that is compiled on first use."""
