"""What belongs to an operating system process: threads, freed memory, the device."""
