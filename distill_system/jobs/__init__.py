"""A run as a job of a Ray cluster: what is sent there, how it stands, how it ends."""
