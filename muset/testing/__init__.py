"""What tests, load runs and demonstrations of the service need, and the service itself does not."""
