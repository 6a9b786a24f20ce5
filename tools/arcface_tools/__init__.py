"""What measures this project itself; used from a checkout, not part of the wheel."""
