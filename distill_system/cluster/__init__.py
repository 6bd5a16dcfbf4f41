"""Everything that touches Ray: the session, placed workers, a deadline on every wait."""
