"""The privacy statement of a run, and its export."""
