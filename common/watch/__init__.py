"""What is measured and shown while engines run: metrics, traces, times, progress."""
