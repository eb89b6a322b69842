"""Workloads, the harness that runs every stage on them in a fresh process, tables, pictures, and peers."""
