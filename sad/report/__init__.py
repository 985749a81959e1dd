"""What a run tells its user: log, terminal, trackers, plots and the report page."""
