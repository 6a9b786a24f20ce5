"""What is measured, in the order of what it says: each module has one `measure(check)` that runs its steps."""
