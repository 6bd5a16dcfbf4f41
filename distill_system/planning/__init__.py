"""A configuration in -> what each worker will hold and what will travel out, before it starts.

Reads the models' config.json and nothing else.
"""
