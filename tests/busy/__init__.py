"""What engines on a CPU must keep of their speed next to busy processes: `make busy`."""
