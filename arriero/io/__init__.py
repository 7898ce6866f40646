"""Files: paths as users write them, writing that never leaves half a file, rows of any data format, and headers."""
