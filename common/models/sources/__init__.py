"""Where weights come from: a reader for each format."""
