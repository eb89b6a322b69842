"""Two or more stages on the same prompts, side by side: a page on localhost (`app`), or a terminal (`terminal`).

Each stage plays in a process of its own (`player`) and reports every step as an event, with its time. A `race` has them
play, one after the other or together, and sends all viewers the same events.
"""
