"""An OpenAI-compatible HTTP server over any stage's engine.

Two threads. One drives the engine and nothing else (`engine_thread`); the other runs the event loop, which speaks HTTP
(`app`). Commands go to the engine through a queue, between two steps; what it says comes back to the loop once a step.
"""
