"""What can be wrong with a machine, its network and its configuration, and what to do about it."""
