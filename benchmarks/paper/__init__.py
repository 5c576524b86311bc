"""The supplement's tables and figures, ours beside theirs."""
