"""What an outsider can see of a run: the peers' status records, who comes and goes, and what is kept of it."""
