"""Build it yourself: starters made from the lesson files, checked by the stages' own tests (`make stage3 build`)."""
