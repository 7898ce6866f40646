"""Rewards: what an answer is worth, by rules, tests, a model, a judge or the user's function."""
