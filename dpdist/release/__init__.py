"""What may be said of a run, and what is given away of it."""
