"""Optimizers whose state is held in codes: everstep.optim."""
