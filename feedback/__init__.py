"""What happened, and how it is kept: events, the log, the board, simulated raters. Imports nothing of ours."""
