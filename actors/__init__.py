"""The Ray runtime: sequence workers, level ranks, the exchange between them, and the conductor of a run."""
