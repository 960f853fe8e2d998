"""Private servers for tests, the demo and measurements: started in a folder, stopped by process id."""
