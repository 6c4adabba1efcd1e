"""One program on many devices and in many processes."""
