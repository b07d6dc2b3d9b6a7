"""The contents of a run directory, and how a run resumes from them."""
