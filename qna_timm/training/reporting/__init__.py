"""What a run tells: progress and log, curves and tables, its folder."""
