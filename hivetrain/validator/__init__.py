"""Scores miners: follows a run, audits its contributions, sets weights."""
