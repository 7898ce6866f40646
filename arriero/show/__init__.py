"""Output for people: the terminal, progress bars, and the style of report pages."""
