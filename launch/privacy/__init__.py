"""`dpdist privacy`: what plans and runs cost, alone and together."""
