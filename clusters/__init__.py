"""The outermost layer: the command line. Imports `nlray.actors` and below; nothing imports it."""
