"""What people look at: the terminal, progress bars, and the style of report pages."""
