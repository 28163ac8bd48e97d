"""Stand-ins for the outside world: authoritative DNS, web services, Telegram, and sinks. One process in node `svc`."""
