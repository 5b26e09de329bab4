"""What benchmarks of servers share: servers, prompts, the client and its latencies."""
