"""The command line. Progress goes to stderr, data to stdout; exit codes are 0, 1 (a claim or check failed), 2 (bad input)."""
