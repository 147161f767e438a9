"""What is known of calls and of the server: the call log, metrics, traces, and the format of log lines."""
