"""Measurements of what training costs: clipping, the stages of a step, and scaling over nodes."""
