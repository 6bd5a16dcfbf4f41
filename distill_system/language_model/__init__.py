"""The one room that knows Hugging Face causal language models: make, load, read, check.

Trajectories in -> the final hidden state before each response token out; the scorer reads the
teacher and the learner reads the student through the same functions.
"""
