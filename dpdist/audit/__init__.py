"""Audits of the guarantee: run the real step, or a whole training, and try to tell from its results who was in it.

An audit gives a lower bound on epsilon, the accountant an upper one: if they cross, something in between is wrong. It
can refute the guarantee and never prove it.
"""
