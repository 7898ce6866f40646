"""Raw documents to clean documents: sources, steps, engine, report. `arriero curate` is its command."""
