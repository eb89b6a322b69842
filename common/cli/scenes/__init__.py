"""What `make stage3` shows: each stage's idea at work on a few requests, next to the stage before it."""
