"""Files: paths as users write them, atomic writing, rows of any data format, and headers."""
