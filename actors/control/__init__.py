"""The conductor: who decides in a run."""
