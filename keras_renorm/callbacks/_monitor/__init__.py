"""What `RenormMonitor` reads, counts and says."""
