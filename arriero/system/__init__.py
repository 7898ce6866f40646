"""What the machine does for everyone: worker processes, and C++ that is compiled on first use."""
