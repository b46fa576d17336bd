"""What is recorded of requests: metrics, journal, traces."""
