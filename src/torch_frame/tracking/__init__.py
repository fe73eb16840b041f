"""What a run tells its people: console and log file, progress bar, metric files, the folder it writes to."""
