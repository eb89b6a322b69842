"""What a cluster would do: the real schedulers, caches and engine loops in virtual time, with steps at a price."""
