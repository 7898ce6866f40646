"""Models for other programs: what each needs, and the proof that it answers there as it does here."""
