"""What lies in a run directory, and how a run goes on from it."""
