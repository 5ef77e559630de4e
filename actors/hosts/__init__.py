"""Actor processes that host the roles of a run, and where they run."""
