"""Do the tests notice a wrong program? `python -m tests.mutants` changes one operator at a time and runs, for each, the
tests that execute its line."""
