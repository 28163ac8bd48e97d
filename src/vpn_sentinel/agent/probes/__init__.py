"""Questions to the network: canaries, nameservers, geolocation."""
