"""Memory, time and price of a stage on machines that nobody needs to have."""
