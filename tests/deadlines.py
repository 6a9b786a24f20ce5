"""How long a test waits before it calls something stuck: only a hang takes so long, on the slowest and busiest host."""

HANG_S = 600.0
