"""Level ranks and the exchange with them."""
