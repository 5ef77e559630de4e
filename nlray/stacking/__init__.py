"""Level stacking: the first state of the levels from a pretrained decoder."""
