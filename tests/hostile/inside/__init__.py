"""What hostile jobs execute. Their sources are given to the job's python3 as text, as nothing of this checkout is in there."""
