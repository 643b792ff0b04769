"""What a stage takes on machines that nobody has yet: memory, time, price."""
