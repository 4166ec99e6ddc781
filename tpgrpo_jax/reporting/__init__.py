"""What people look at: the history of runs, plots and a page."""
